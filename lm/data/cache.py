"""The folder for everything that can be made again."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """Returns $LM_CACHE, or ~/.cache/lm where it is not set."""
    return Path(os.environ.get("LM_CACHE") or Path.home() / ".cache" / "lm").expanduser()


def build_once(path: Path, build: Callable[[], None]) -> Path:
    """Returns a path after `build` has made it, however many processes ask for it at a time.

    `build` has to make it in one piece, by a rename, since others look without taking the lock.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                build()
    return path
