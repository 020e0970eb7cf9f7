"""Settings of every test: eight CPU devices, exact products, fixed seeds."""

import os
import sys

# The tests compile hundreds of tiny programs and run each a few times.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# A limit is what makes jax lock the cache of programs, which several processes share here.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 << 30)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # As `lm.core.runtime.prepare`, and why.

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each file to one worker, so that what its tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory):
    """Keeps programs that take long to compile on disk, for all processes of this session.

    Commands in a process of their own, and `lm.core.runtime.prepare`, find them by the variable.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def same_draws():
    """Torch draws the same values in a test, whatever ran before it in this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def unload_programs():
    """Frees the compiled programs of a file of tests once it is done.

    Each program maps several regions of memory, and a process may have 65,530 of them: the whole
    suite in one process comes to more, and LLVM then ends it with a segmentation fault.
    """
    yield
    jax.clear_caches()
