"""What must be settled before jax starts: the heap, the compilation cache, the platform.

`prepare` runs first thing in a program. It imports jax only after the heap is set.
"""

import ctypes
import functools
import os
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lm.core.beat import own_beat
from lm.core.distributed import Hosts, join

# These builds drop terms of sums on CPU (jax issue 39103): a jitted sum of squares is off by 0.8 %.
WRONG_SUMS_ON_CPU = ("0.10.2", "0.11.0")

# What `prepare` chose for this process, name -> text, for the plan of a run.
CHOSEN: dict[str, str] = {}

_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1
# Of address space, set aside for small allocations by `settle_heap`.
_RESERVE_BYTES = 1 << 26


def prepare(
    platform: str = "",
    cache_dir: str | os.PathLike | None = None,
    hosts: Hosts | None = None,
) -> None:
    """Prepares this process for jax; call it before anything imports jax's backend.

    On Linux CPUs it keeps the heap: XLA allocates the temporaries of every step anew, glibc maps
    and unmaps them, and the page faults cost more than the arithmetic (1.4 to 5 times in small
    models). `settle_heap` alone returns kept memory to the system; `LM_KEEP_HEAP=0` opts out.
    Compiled programs are cached on disk: in `cache_dir`, else in `$JAX_COMPILATION_CACHE_DIR`,
    else in 'jax' under `$LM_CACHE` or ~/.cache/lm.

    Args:
      platform: 'cpu', 'gpu', 'cuda' or 'tpu' to insist on; '' takes what jax finds, or what
        JAX_PLATFORMS names.
      cache_dir: where compiled programs are kept.
      hosts: the processes that this one is one of; None where it is alone.

    Raises:
      ValueError: if the platform asked for is not there, or jaxlib is one that computes wrong
        sums on CPU; or as of `lm.core.distributed.join`.
    """
    if platform:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(platform, platform)
    # Whether jax will use a CPU is known for certain only after it starts, and then is too late.
    wants_cpu = os.environ.get("JAX_PLATFORMS", "cpu").split(",")[0] in ("", "cpu")
    if wants_cpu and os.environ.get("LM_KEEP_HEAP", "1") != "0":
        kept = "kept between steps (LM_KEEP_HEAP=0 gives it back)"
        CHOSEN["heap"] = kept if keep_heap() else "given back between steps"
    own_beat()
    # XLA reports every program that it loads from the cache on CPU as an error, in a page of text;
    # what goes wrong in earnest arrives as an exception.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax and Grain warn about how they are used here.
    if wants_cpu:
        # A program that is dispatched early takes its temporaries before the one that still runs
        # gives its own back, and there is no core left to gain anything from it.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if hosts is not None:
        CHOSEN["processes"] = join(hosts)
    check_jaxlib(start_backend(), jaxlib_version())
    ours = Path(os.environ.get("LM_CACHE") or Path.home() / ".cache" / "lm").expanduser() / "jax"
    cache = cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR") or ours
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    CHOSEN["compiled programs"] = f"kept in {cache} (JAX_COMPILATION_CACHE_DIR)"


@functools.cache
def cache_events() -> Counter:
    """Returns how many programs came from the cache on disk ('hits') and did not ('misses').

    They are counted in this process, from the first call of this function on.
    """
    import jax

    counts = Counter()

    def listen(event: str, **_: object) -> None:
        if event.startswith("/jax/compilation_cache/cache_"):
            counts[event.rpartition("_")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    return counts


def keep_heap() -> bool:
    """Tells glibc to keep freed memory: one arena, no mmap, no trimming. Returns whether it did.

    All three are needed: with several arenas the threads of XLA still fault.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has none, and does not unmap as eagerly.
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])


def settle_heap() -> None:
    """Makes a kept heap ready for the steps of a program that has just been compiled.

    What compiling left over is returned to the system. Then a place is set aside for small
    allocations: made in the hole that the temporaries of a step leave, they would spoil it for
    those of the next, which so need two or three times the memory in the end.
    """
    if not CHOSEN.get("heap", "").startswith("kept"):
        return
    ctypes.CDLL(None).malloc_trim(0)
    _set_reserve_aside()


@functools.cache
def _set_reserve_aside() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = ctypes.c_size_t(_RESERVE_BYTES)
    reserve, _ = libc.malloc(size), libc.malloc(size)
    # The second stays, untouched and so not resident: it keeps the first from growing together
    # with what is free behind it.
    libc.free(reserve)


def start_backend() -> str:
    """Starts jax and returns the platform of its default device.

    Raises:
      ValueError: if a platform was asked for by JAX_PLATFORMS and cannot be had.
    """
    import jax

    try:
        return jax.default_backend()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS") or "any platform"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{asked} was asked for and jax cannot start it ({reason}): install the extra for it "
            "(pip install 'lm[cuda]' or 'lm[tpu]'), or ask for cpu"
        ) from error


def jaxlib_version() -> str:
    """Returns the version of the installed jaxlib; '' if it has no metadata."""
    try:
        return version("jaxlib")
    except PackageNotFoundError:
        return ""


def check_jaxlib(backend: str, jaxlib: str) -> None:
    """Raises a ValueError for a build of jaxlib that is known to compute wrong sums on CPU."""
    if backend == "cpu" and jaxlib in WRONG_SUMS_ON_CPU:
        raise ValueError(
            f"jaxlib {jaxlib} computes wrong sums on CPU (github.com/jax-ml/jax/issues/39103): "
            "install another, such as pip install 'jax!=0.10.2,!=0.11.0'"
        )
