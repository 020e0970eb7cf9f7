"""A gcloud that answers as the real one does, and whose workers are folders and local processes.

Everything it knows lies in the folder $FAKE_GCLOUD: the configuration, the queued resources, the
faults that it is to have, and all calls so far. `tests/tpu/cloud.py` writes that.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ.get("FAKE_GCLOUD", "."))
# Machines of a type, as networkEndpoints of a real one has them.
MACHINES = {"v5litepod-8": 1, "v5litepod-16": 4, "v4-16": 2}
QUEUE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
# Variables of the laptop that a worker would not have.
OURS = ("JAX_PLATFORMS", "XLA_FLAGS", "LM_CACHE")
LEAVING = ["SUSPENDING", "SUSPENDED"]


@contextlib.contextmanager
def memory(root: Path):
    """Gives what is remembered, and writes it back; one process at a time."""
    with (root / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = root / "memory.json"
        known = json.loads(path.read_text())
        yield known
        # Whole or not at all: a call may be killed at any moment.
        (root / "memory.part").write_text(json.dumps(known))
        (root / "memory.part").replace(path)


def fail(message: str, status: int = 1):
    print(f"ERROR: ({'.'.join(['gcloud', *POSITIONAL[:-1]])}) {message}", file=sys.stderr)
    sys.exit(status)


def not_found(kind: str, name: str):
    where = f"projects/{FLAGS['project']}/locations/{FLAGS['zone']}/{kind}/{name}"
    fail(f"NOT_FOUND: Resource '{where}' was not found. This command is authenticated as me@x.org")


def lost_connection():
    print("kex_exchange_identification: Connection closed by remote host", file=sys.stderr)
    fail("[/usr/bin/ssh] exited with return code [255].", 255)


FAULTS = {
    "unavailable": lambda: fail("UNAVAILABLE: The service is currently unavailable."),
    "unreachable": lost_connection,
    "hang": lambda: time.sleep(600),
    "login": lambda: fail(
        "You do not currently have an active account selected.\nPlease run:\n\n"
        "  $ gcloud auth login\n\nto obtain new credentials."
    ),
    "disabled": lambda: fail(
        "PERMISSION_DENIED: Cloud TPU API has not been used in project p before or it is disabled."
    ),
    "quota": lambda: fail(
        'RESOURCE_EXHAUSTED: {"code": 8, "message": "Quota limit \'TPUV5sLitepodPerProject\' has '
        'been exceeded. Limit: 16 in zone us-west4-a."}'
    ),
}


def fault() -> str:
    """Returns how this call is to fail, and whether it is to be heard nevertheless."""
    with memory(ROOT) as known:
        for plan in known["faults"]:
            if plan["times"] > 0 and all(part in " ".join(sys.argv) for part in plan["match"]):
                plan["times"] -= 1
                return plan["how"]
    return ""


def slot(root: Path, name: str, number: int, worker: int) -> Path:
    """Returns the home of a worker."""
    return root / "machines" / f"{name}.{number}" / f"worker-{worker}"


def create(name: str):
    with memory(ROOT) as known:
        if name in known["requests"]:
            fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
        number = known["made"] = known["made"] + 1
        states = [s for s in QUEUE] if known["grants"] > 0 else [*QUEUE[:1], "FAILED"]
        known["grants"] -= 1
        known["requests"][name] = {
            "type": FLAGS["accelerator-type"],
            "number": number,
            "states": states,
        }


def describe_request(name: str):
    with memory(ROOT) as known:
        request = known["requests"].get(name)
        if request is None:
            not_found("queuedResources", name)
        states = request["states"]
        state = states[0]
        if len(states) > 1:
            states.pop(0)
        for worker in range(MACHINES[request["type"]]):
            if state == "ACTIVE":
                (slot(ROOT, name, request["number"], worker) / "tmp").mkdir(
                    parents=True, exist_ok=True
                )
    told = {"state": state}
    if state == "FAILED":
        told["failedData"] = {"error": {"code": 8, "message": "no more capacity in the zone"}}
    print(json.dumps({"name": f"projects/p/queuedResources/{name}", "state": told}))


def node_of(name: str) -> tuple[dict, str]:
    """Returns the request and the state of its node."""
    with memory(ROOT) as known:
        request = known["requests"].get(name)
    if request is None or (request["states"] != ["ACTIVE"] and request["states"][-1] == "ACTIVE"):
        not_found("nodes", name)
    state = request.get("node", "READY") if request["states"] == ["ACTIVE"] else "PREEMPTED"
    return request, state


def describe_node(name: str):
    request, state = node_of(name)
    count = MACHINES[request["type"]]
    endpoints = [{"ipAddress": f"10.0.0.{n}", "port": 8470} for n in range(count)]
    print(
        json.dumps(
            {
                "acceleratorType": request["type"],
                "networkEndpoints": endpoints,
                "state": state,
            }
        )
    )


def delete(name: str):
    with memory(ROOT) as known:
        if name not in known["requests"]:
            not_found("queuedResources", name)
        if "force" not in FLAGS:
            fail("FAILED_PRECONDITION: the queued resource has nodes")
        request = known["requests"].pop(name)
    from tests.tpu.cloud import kill_processes_of

    folder = slot(ROOT, name, request["number"], 0).parent
    kill_processes_of(folder)
    shutil.rmtree(folder, ignore_errors=True)


def machine(name: str) -> Path:
    request, state = node_of(name)
    if state != "READY":
        fail(f'This TPU has terminal state "{state}", so it cannot be used anymore.')
    worker = int(FLAGS["worker"])
    if worker >= MACHINES[request["type"]]:
        fail(f"Invalid value for [--worker]: worker {worker} does not exist")
    print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
    return slot(ROOT, name, request["number"], worker)


def scp(*words: str):
    folder = machine(words[-1].removesuffix(":"))
    for source in words[:-1]:
        shutil.copy(source, folder)


def ssh(name: str, cut_after: int = 0):
    folder = machine(name)
    env = {
        **{key: value for key, value in os.environ.items() if key not in OURS},
        "HOME": str(folder),
        "LM_TPU_TMP": str(folder / "tmp"),
        "FAKE_WORKER": FLAGS["worker"],
    }
    process = subprocess.Popen(
        ["bash", "-c", FLAGS["command"]],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    for number, line in enumerate(process.stdout, 1):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        if number == cut_after:
            process.kill()
            lost_connection()
    status = process.wait()
    # The end of a connection hangs up on what it has started and left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGHUP)
    if status < 0 or status == 255:
        lost_connection()
    sys.exit(status)


def config(name: str):
    with memory(ROOT) as known:
        value = known["config"].get(name, "")
    if value:
        print(value)
    else:
        print("(unset)", file=sys.stderr)


def main():
    with (ROOT / "calls").open("a") as calls:
        calls.write(json.dumps(["gcloud", *sys.argv[1:]]) + "\n")
    verb = " ".join(POSITIONAL[:4])
    how = fault()
    cut = 0
    if how.startswith("cut after "):
        cut, how = int(how.split()[-1]), ""
    heard = how.endswith(", heard")
    if how and not heard:
        FAULTS[how]()
    if verb.startswith("config get-value"):
        config(POSITIONAL[-1])
        return
    assert POSITIONAL[:2] == ["compute", "tpus"], sys.argv
    name, rest = POSITIONAL[4], POSITIONAL[4:]
    if verb == "compute tpus tpu-vm ssh":
        ssh(name, cut)
    elif verb == "compute tpus tpu-vm scp":
        scp(*rest)
    else:
        {
            "compute tpus queued-resources create": create,
            "compute tpus queued-resources describe": describe_request,
            "compute tpus queued-resources delete": delete,
            "compute tpus tpu-vm describe": describe_node,
        }[verb](name)
    if heard:
        FAULTS[how.removesuffix(", heard")]()


POSITIONAL = [word for word in sys.argv[1:] if not word.startswith("--")]
FLAGS = {
    word[2:].partition("=")[0]: word.partition("=")[2]
    for word in sys.argv[1:]
    if word.startswith("--")
}

if __name__ == "__main__":
    main()
