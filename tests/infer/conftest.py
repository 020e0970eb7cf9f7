"""Every model that generates, and a count of what XLA compiles."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from lm.models.encdec import EncoderDecoder
from tests.conformance.harness import cells, tiny


@pytest.fixture(params=cells("decode"))
def each(request):
    """Every generating family: a tiny model, random parameters."""
    model, params = tiny(request.param)
    has_encoder = isinstance(model, EncoderDecoder)
    return SimpleNamespace(name=request.param, model=model, params=params, has_encoder=has_encoder)


@pytest.fixture(scope="session")
def teeny():
    return SimpleNamespace(**dict(zip(("model", "params"), tiny("teeny_gpt"))))


@contextlib.contextmanager
def _compilations():
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def compilations():
    """A context manager whose list has one entry for each program XLA compiles meanwhile."""
    return _compilations
