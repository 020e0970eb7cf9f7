"""tpu/requirements.lock is a lock, of what setup.py asks for, at versions the project takes."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lm.core.runtime import WRONG_SUMS_ON_CPU
from tpu import worker

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "tpu/requirements.lock"
# As the markers of a lock for the workers are read, wherever this runs.
MACHINE = {
    "python_version": worker.PYTHON,
    "python_full_version": f"{worker.PYTHON}.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def locked() -> dict[str, tuple[str, int]]:
    """Returns package -> version and number of hashes."""
    found = {}
    for entry in re.split(r"(?<!\\)\n", LOCK.read_text()):
        if entry and not entry.startswith("#"):
            first, *hashes = entry.replace("\\\n", "").split()
            name, _, version = first.partition("==")
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text) for text in hashes), name
            assert canonicalize_name(name) not in found
            found[canonicalize_name(name)] = version, len(hashes)
    return found


def asked(monkeypatch) -> list[str]:
    """Returns the requirements of setup.py with the extra [tpu], and tpu/requirements.in's."""
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: told.update(settings))
    runpy.run_path(str(ROOT / "setup.py"))
    more = (ROOT / "tpu/requirements.in").read_text().splitlines()
    lines = [*told["install_requires"], *told["extras_require"]["tpu"], *more]
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def test_every_package_has_one_version_and_hashes():
    packages = locked()
    assert len(packages) > 50
    assert all(Version(version) and hashes for version, hashes in packages.values())


def test_it_holds_what_is_asked_for(monkeypatch):
    packages = locked()
    requirements = [Requirement(line) for line in asked(monkeypatch)]
    assert {"jax", "flax", "gcsfs", "setuptools"} <= {need.name for need in requirements}
    for need in requirements:
        if need.marker is None or need.marker.evaluate(MACHINE):
            version, _ = packages[canonicalize_name(need.name)]
            assert need.specifier.contains(version, prereleases=True), f"{need} is {version}"
    assert "libtpu" in packages  # What [tpu] is for.
    assert packages["jax"][0] == packages["jaxlib"][0]
    assert packages["jaxlib"][0] not in WRONG_SUMS_ON_CPU


def test_oracles_of_the_tests_are_not_sent():
    assert not {"torch", "transformers", "peft", "tensorflow"} & locked().keys()


@pytest.mark.parametrize("line", ["python-version", "generate-hashes", "tpu/requirements.in"])
def test_its_head_says_how_it_is_made(line):
    head = [text for text in LOCK.read_text().splitlines() if text.startswith("#")]
    assert line in "\n".join(head)
