"""Settings of every test: eight CPU devices, exact products, fixed seeds."""

import os
import sys

# The tests compile hundreds of tiny programs and run each a few times.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # As `lm.core.runtime.prepare`, and why.

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# A command called in a test turns the cache of compiled programs on for the rest of the process.
# Tests depend on nothing that an earlier run left behind, and fill no cache that they do not use.
jax.config.update("jax_enable_compilation_cache", False)


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
