"""The working tree as one archive: what git tracks, and what it would, were it added."""

import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

LOCK = Path("tpu/requirements.lock")


@dataclass(frozen=True)
class Tree:
    """A working tree.

    Attributes:
      root: its top folder.
      files: tracked, and untracked and not ignored, relative to it, in order.
      fingerprint: 16 hex digits of the names, the modes and the contents of these files.
      commit: what `git describe` says; '' before the first commit.
    """

    root: Path
    files: tuple[Path, ...]
    fingerprint: str
    commit: str


def read_tree(folder: str | Path = ".") -> Tree:
    """Returns the working tree that a folder lies in.

    Raises:
      ValueError: if there is none, or it has no lock.
    """
    root = git(Path(folder), "rev-parse", "--show-toplevel")
    if not root:
        raise ValueError(
            f"{Path(folder).resolve()} is in no git checkout: run this from the checkout whose "
            "files are to be copied"
        )
    top = Path(root)
    names = git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    # A file that was deleted and is still in the index is listed as well; so is a submodule.
    files = tuple(sorted({Path(n) for n in names.split("\0") if n and holds(top / n)}))
    if LOCK not in files:
        raise ValueError(f"{top} has no {LOCK}, which the workers install from")
    digest = hashlib.sha256()
    for file in files:
        body = hashlib.sha256(contents(top / file)).hexdigest()
        digest.update(f"{file.as_posix()}\0{mode(top / file):o}\0{body}\n".encode())
    commit = git(top, "describe", "--always", "--dirty", "--abbrev=40")
    return Tree(top, files, digest.hexdigest()[:16], commit)


def pack(tree: Tree, path: Path) -> None:
    """Writes the files of a tree as a tar.gz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=6) as archive:
        for file in tree.files:
            source = tree.root / file
            entry = tarfile.TarInfo(file.as_posix())
            entry.mode = mode(source)
            if source.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, str(source.readlink())
                archive.addfile(entry)
                continue
            body = contents(source)
            entry.size, entry.mtime = len(body), int(source.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(body))
    part.replace(path)


def holds(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def contents(path: Path) -> bytes:
    return str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()


def mode(path: Path) -> int:
    executable = not path.is_symlink() and path.stat().st_mode & 0o100
    return 0o755 if executable else 0o644


def git(folder: Path, *words: str) -> str:
    """Returns what git says; '' if it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"git cannot be run: {error}") from error
    return done.stdout.strip("\n") if done.returncode == 0 else ""
