"""What the conformance table needs of any model: random parameters, inputs, one way to run it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import map_with_path
from lm.models import params as P
from lm.models.encdec import EncoderDecoder
from lm.models.zoo import all_families

FAMILIES = all_families()
B, T = 2, 12
# In the fast tests one family of each kind stands for the others; the encoder is that of T5.
KINDS = {"gpt2", "t5", "mamba"}
# Of these the columns that take longest, of an encoder-decoder, are left to the slow tests.
LONG = {("t5", cell) for cell in ("pure", "remat", "scan", "overfit", "gradients", "packed")}


@functools.cache
def tiny(name: str):
    """Returns the tiny model of a family with every parameter random, norms and biases too."""
    family = FAMILIES[name]
    model = family.build(**family.tiny)
    return model, random_params(model)


def random_params(model):
    """Returns parameters of a model, every one of them random."""
    key = jax.random.key(1)

    def perturb(path, leaf):
        noise = jax.random.normal(jax.random.fold_in(key, hash_of(path)), leaf.shape)
        return leaf + 0.1 * noise

    return jax.jit(lambda: map_with_path(perturb, P.init(model, jax.random.key(0))))()


def hash_of(path: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(path)) % 2**31


def random_tokens(model, shape=(B, T), seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, model.vocab_size, shape), jnp.int32)


def with_source(model, ctx: Context, tokens, segments=None) -> Context:
    """Gives an encoder-decoder its source: the tokens backwards."""
    if not isinstance(model, EncoderDecoder):
        return ctx
    if segments is not None:
        segments = segments[:, ::-1]
    return ctx.replace(source_BS=tokens[:, ::-1], source_segments_BS=segments)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, ctx, state=None):
    return model.apply({"params": params}, tokens, ctx, state)


def loss_fn(model, params, tokens, ctx):
    """Mean negative log-likelihood of each next token (or the token itself, bidirectionally)."""
    logits, _ = model.apply({"params": params}, tokens, ctx)
    targets = jnp.roll(tokens, -1, axis=1)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()


# Compiled once for all the tests of a family.
grads_of = jax.jit(jax.grad(loss_fn, argnums=1), static_argnums=0)


def cells(cell: str):
    """Rows of a column: each family, but those that give a reason why the cell is not theirs.

    Those that take longest run with the slow tests.
    """
    names = [name for name, family in FAMILIES.items() if cell not in family.inapplicable]
    quick = [name for name in names if name in KINDS and (name, cell) not in LONG]
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
