"""What stops a program before it computes anything, in one sentence."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_prepare_refuses_a_wrong_jaxlib(tmp_path):
    code = (
        "from lm.core import runtime; runtime.jaxlib_version = lambda: '0.10.2'; "
        f"runtime.prepare('cpu', {str(tmp_path)!r})"
    )
    assert "ValueError: jaxlib 0.10.2 computes wrong sums" in run(code).stderr


@pytest.mark.slow
def test_an_absent_accelerator_is_refused(tmp_path):
    done = run(f"from lm.core import runtime; runtime.prepare('tpu', {str(tmp_path)!r})")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith("ValueError: tpu was asked for"), last


def test_prepare_keeps_the_heap_and_caches_programs(tmp_path):
    code = (
        "import sys; from lm.core import runtime; assert 'jax' not in sys.modules; "
        f"runtime.prepare('cpu', {str(tmp_path)!r}); import jax; "
        "jax.jit(lambda x: x + 1)(1).block_until_ready(); "
        "print(jax.default_backend(), runtime.keep_heap())"
    )
    done = run(code)
    assert done.stdout.split() == ["cpu", str(sys.platform == "linux")], done.stderr
    assert any(tmp_path.iterdir())
