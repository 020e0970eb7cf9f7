"""The command line of `python -m tpu`."""

import argparse
import re
import sys
from collections.abc import Sequence

from tpu.follow import Ending, follow
from tpu.gcloud import Exists, Gcloud, NotFound, TpuError
from tpu.slice import Slice
from tpu.topology import Topology, all_topologies, topology_of
from tpu.tree import read_tree
from tpu.watch import Job, Watch, check_resumes

NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
PAIR = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
STOP_SECONDS = 300.0

ABOUT = {
    "create": "ask for a slice, and wait until it is there",
    "setup": "copy the working tree to all workers, and install the lock",
    "run": "start a command on all workers, and follow it",
    "status": "how the slice is, and what its workers do",
    "logs": "what the workers print, from the last lines on",
    "stop": "end the run on all workers; the machines stay, and cost",
    "delete": "delete the slice, and what lies on its machines",
    "watch": "create, set up and run, and after a preemption again, until the run is complete",
    "types": "the accelerator types there are presets for",
}
# What Ctrl-C leaves as it is, and how to come back to it.
LEFT = {
    "create": "the request stays in the queue: the same command waits for it again, and "
    "python -m tpu delete {name} takes it back",
    "setup": "setup is not complete: run it again",
    "run": "the run goes on: python -m tpu logs {name} comes back to it, python -m tpu stop {name} "
    "ends it",
    "watch": "the slice and the run go on, and nobody resumes them now: the same command watches "
    "again, python -m tpu delete {name} ends both",
    "logs": "the run goes on: the same command comes back to it",
    "stop": "the run may still be ending: python -m tpu status {name}",
    "delete": "the deletion goes on: python -m tpu status {name}",
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 2 after bad input, 1 if a run failed."""
    words = list(sys.argv[1:] if words is None else words)
    cut = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:cut])
    args.command = tuple(words[cut + 1 :])
    try:
        return globals()[f"do_{args.verb}"](args)
    except ValueError as error:
        print(f"tpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = LEFT.get(args.verb, "nothing was changed").format(name=getattr(args, "name", ""))
        print(f"\ntpu: {left}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m tpu", description=__doc__)
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    parts = {verb: verbs.add_parser(verb, help=t, description=t) for verb, t in ABOUT.items()}
    for verb, part in parts.items():
        if verb == "types":
            continue
        part.add_argument("name", metavar="NAME", help="of the queued resource and its node")
        part.add_argument("--project", default="", help="[what gcloud is configured for]")
        part.add_argument("--zone", default="", help="[what gcloud is configured for]")
        part.add_argument("--type", default="", help="such as v5litepod-16; see types")
        part.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    for verb in ("create", "watch"):
        part = parts[verb]
        part.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
        part.add_argument("--runtime-version", default="", help="[the one of the type]")
        part.add_argument(
            "--gcloud-flag", action="append", default=[], help="added to the request; repeatable"
        )
    for verb in ("create", "run", "watch"):
        parts[verb].add_argument(
            "--poll", type=float, default=30.0, help="seconds between two looks [30]"
        )
    parts["create"].add_argument("--no-wait", action="store_true", help="leave it in the queue")
    for verb in ("run", "watch"):
        part = parts[verb]
        part.usage = f"python -m tpu {verb} NAME [OPTION ...] -- COMMAND ..."
        part.add_argument("--platform", choices=("tpu", "cpu"), default="tpu", help="[tpu]")
        part.add_argument(
            "--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable"
        )
    parts["run"].add_argument("--detach", action="store_true", help="do not follow it")
    parts["watch"].add_argument(
        "--restarts", type=int, default=3, help="after failures on machines that are well [3]"
    )
    parts["watch"].add_argument("--delete", action="store_true", help="the slice, at the end")
    parts["logs"].add_argument("--worker", type=int, default=None, help="[all]")
    parts["logs"].add_argument("--lines", type=int, default=20, help="from before [20]")
    parts["logs"].add_argument("--no-follow", action="store_true", help="only what there is")
    parts["stop"].add_argument(
        "--grace", type=float, default=STOP_SECONDS, help="seconds before it is killed [300]"
    )
    return whole


def open_slice(args: argparse.Namespace, needs_type: bool = False) -> Slice:
    """Returns the slice of a command line; TpuError if its name, type or place is none."""
    if not NAME.fullmatch(args.name):
        raise TpuError(
            f"{args.name!r} is no name of a TPU: a letter, then letters, digits and hyphens, all "
            "lower case, at most 63"
        )
    topology: Topology | None = topology_of(args.type) if args.type else None
    if topology is None and (needs_type or (args.dry_run and args.verb != "delete")):
        why = "" if needs_type else ", since a dry run asks nobody how many workers there are"
        raise TpuError(f"--type is missing{why}: pass one such as --type v5litepod-16")
    return Slice(args.name, Gcloud(args.project, args.zone, args.dry_run), topology)


def ready_workers(slice: Slice) -> int:
    """Returns how many workers a slice has; TpuError if it is not ready, or of another type."""
    return slice.check_type(slice.ready()).workers


def command_of(args: argparse.Namespace) -> tuple[str, ...]:
    if not args.command:
        raise TpuError(
            "nothing to run: put it last, after --, such as -- lm train experiments/headlines.py"
        )
    for pair in args.env:
        if not PAIR.fullmatch(pair):
            raise TpuError(f"--env takes NAME=VALUE, not {pair!r}")
    return args.command


def do_types(args: argparse.Namespace) -> int:
    for topology in all_topologies().values():
        print(f"{topology}; {topology.generation.runtime}")
    return 0


def do_create(args: argparse.Namespace) -> int:
    slice = open_slice(args, needs_type=True)
    print(f"# {slice.topology}")
    try:
        slice.create(args.spot, args.runtime_version, args.gcloud_flag)
    except Exists:
        print(f"{slice.name} was asked for before")
    if args.no_wait:
        return 0
    slice.check_type(slice.wait_until_ready(args.poll))
    if not args.dry_run:
        print(f"it costs until python -m tpu delete {slice.name}; next: setup, then run")
    return 0


def do_setup(args: argparse.Namespace) -> int:
    tree = read_tree()
    slice = open_slice(args)
    slice.setup(tree, ready_workers(slice))
    return 0


def do_run(args: argparse.Namespace) -> int:
    command, tree = command_of(args), read_tree()
    slice = open_slice(args)
    workers = ready_workers(slice)
    slice.start(command, tree, workers, args.platform, args.env)
    if args.detach:
        print(LEFT["run"].format(name=slice.name))
        return 0

    def stop_rest(ending: Ending) -> None:
        print(f"{slice.name}: stopping the workers that are left")
        slice.stop(workers, 60.0, "with the others")

    endings = follow(slice, list(range(workers)), stop_rest=stop_rest)
    return report(slice, endings)


def report(slice: Slice, endings: dict[int, Ending | None]) -> int:
    """Says how a run ended, and what goes on costing; returns the exit status."""
    if slice.gcloud.dry_run:
        return 0
    good = all(ending is not None and ending.status == 0 for ending in endings.values())
    print(
        f"{slice.name}: the run {'is complete' if good else 'failed'}; the machines cost until "
        f"python -m tpu delete {slice.name}"
    )
    return 0 if good else 1


def do_status(args: argparse.Namespace) -> int:
    slice = open_slice(args)
    state = slice.look()
    if state.kind == "missing":
        slice.ready()
    what = f" {state.accelerator_type}, {state.workers} workers," if state.workers else ""
    if not args.dry_run:
        print(f"{slice.name}:{what} {state.detail}, in {slice.gcloud.zone}")
    if state.kind != "ready":
        return 0
    states = slice.states(state.workers)
    for worker, run in enumerate(states if not args.dry_run else ()):
        line = run["state"] if run["state"] != "ended" else str(Ending(run["status"]))
        command = f": {' '.join(run['command'])}" if run["command"] else ""
        print(f"[{worker}] {line}{command}  (tree {run['tree']})")
    return 0


def do_logs(args: argparse.Namespace) -> int:
    slice = open_slice(args)
    workers = ready_workers(slice)
    if args.worker is not None and not 0 <= args.worker < workers:
        raise TpuError(f"{slice.name} has workers 0 to {workers - 1}, and no {args.worker}")
    chosen = list(range(workers)) if args.worker is None else [args.worker]
    options = [f"--last={args.lines}", *["--once"] * args.no_follow]
    endings = follow(slice, chosen, *options)
    if not args.dry_run:
        for worker, ending in endings.items():
            print(f"worker {worker} {ending or 'goes on'}")
    return 0


def do_stop(args: argparse.Namespace) -> int:
    slice = open_slice(args)
    for worker, said in enumerate(slice.stop(ready_workers(slice), args.grace)):
        if not args.dry_run:
            print(f"[{worker}] {said}")
    if not args.dry_run:
        print(f"the machines cost until python -m tpu delete {slice.name}")
    return 0


def do_delete(args: argparse.Namespace) -> int:
    slice = open_slice(args)
    try:
        slice.delete()
    except NotFound:
        slice.ready()
        raise
    if not args.dry_run:
        print(f"{slice.name} is deleted, and what lay on its machines; it costs no more")
    return 0


def do_watch(args: argparse.Namespace) -> int:
    command = command_of(args)
    check_resumes(command)
    if args.restarts < 0:
        raise TpuError(f"--restarts is 0 or more, not {args.restarts}")
    tree = read_tree()
    slice = open_slice(args, needs_type=True)
    job = Job(
        command,
        tree,
        args.platform,
        tuple(args.env),
        args.spot,
        args.runtime_version,
        tuple(args.gcloud_flag),
        args.restarts,
        args.poll,
        STOP_SECONDS,
    )
    if args.dry_run:
        show_watch(slice, job, args.delete)
        return 0
    Watch(slice, job).run()
    if args.delete:
        slice.delete()
        print(f"{slice.name}: the run is complete, and the slice is deleted; it costs no more")
        return 0
    return report(slice, {0: Ending(0)})


def show_watch(slice: Slice, job: Job, delete: bool) -> None:
    """Prints what watching does, in the order in which it does it once."""
    assert slice.topology is not None
    workers = slice.topology.workers
    print("# where there is none, and after a preemption:")
    slice.create(job.spot, job.runtime, job.flags)
    print(f"# every {job.poll:g} s:")
    slice.look()
    print("# once it is ready:")
    slice.states(workers)
    slice.setup(job.tree, workers)
    slice.start(job.command, job.tree, workers, job.platform, job.env)
    follow(slice, list(range(workers)))
    print("# after a preemption, and then from the top:")
    slice.delete()
    if delete:
        print("# at the end:")
        slice.delete()
