"""Parity of encoder-decoders with their Hugging Face classes, and what a source may change."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lm.core.context import Context
from lm.models.family import Family
from tests.parity import hf


def logits_of(module, source, source_mask, tokens) -> torch.Tensor:
    return module(
        input_ids=torch.from_numpy(source).long(),
        attention_mask=torch.from_numpy(source_mask),
        decoder_input_ids=torch.from_numpy(tokens).long(),
        use_cache=False,
    ).logits


def assert_parity(family: Family, module: torch.nn.Module, tolerance: float = 1e-4):
    """Logits with a padded source, decoding from a state, gradients, and the way back."""
    model, params = hf.import_torch(family, module)
    hf.assert_round_trip(family, module, model, params)
    source = hf.ids(model.vocab_size, seed=0)
    tokens = hf.ids(model.vocab_size, (2, 17), seed=1)
    mask = hf.right_padded()
    ctx = Context(source_BS=jnp.asarray(source), source_segments_BS=jnp.asarray(mask))

    module.zero_grad()
    theirs = logits_of(module, source, mask, tokens)
    chosen = torch.from_numpy(np.roll(tokens, -1, 1)).long()
    torch_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), chosen.flatten())
    torch_loss.backward()

    def loss(params):
        logits, _ = model.apply({"params": params}, jnp.asarray(tokens), ctx)
        log_probs = jax.nn.log_softmax(logits)
        targets = jnp.asarray(np.roll(tokens, -1, 1))[..., None]
        return -jnp.take_along_axis(log_probs, targets, -1).mean(), logits

    (value, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = theirs.detach().numpy()
    assert np.abs(theirs).max() > 0.5
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance
    assert abs(float(value) - torch_loss.item()) <= 1e-5
    hf.assert_gradients(family, module, model, params, grads)

    step = jax.jit(lambda t, c, s: model.apply({"params": params}, t, c, s))
    first, state = step(tokens[:, :5], ctx.replace(cache_length=17), None)
    pieces = [first]
    for t in range(5, 17):
        logits, state = step(tokens[:, t : t + 1], Context(), state)
        pieces.append(logits)
    assert np.abs(np.concatenate(pieces, 1) - theirs).max() <= tolerance
    return model, params


def assert_conditional(model, params) -> None:
    """Logits depend on every token of the source, not on later tokens nor on padding."""
    source = jnp.asarray(hf.ids(model.vocab_size, (2, 9), seed=2))
    tokens = jnp.asarray(hf.ids(model.vocab_size, (2, 8), seed=3))
    table = params["embed"]["table"]

    def apply(params, tokens, ctx):
        return model.apply({"params": params}, tokens, ctx)[0]

    def stack_outputs(source_embedded, target_embedded):
        """The decoder's output as a function of both embedded sides."""

        def run(module):
            ctx = Context(segments_BT=jnp.ones_like(source), causal=False)
            ctx = ctx.replace(positions_BT=jnp.broadcast_to(jnp.arange(9), (2, 9)))
            memory = module.encoder(source_embedded, ctx)[0]
            ctx = Context(memory_BSD=memory, causal=True)
            ctx = ctx.replace(positions_BT=jnp.broadcast_to(jnp.arange(8), (2, 8)))
            return module.decoder(target_embedded, ctx)[0][0, 4]

        return model.apply({"params": params}, method=run)

    sides = table[source], table[tokens]
    by_source, by_target = jax.jit(jax.jacrev(stack_outputs, argnums=(0, 1)))(*sides)
    assert (jnp.abs(by_source[:, 0]).max((0, 2)) > 0).all()  # Every token of the row's source,
    assert (by_source[:, 1] == 0).all()  # none of another row's,
    assert (jnp.abs(by_target[:, 0, :5]).max((0, 2)) > 0).all()  # itself and what is before,
    assert (by_target[:, 0, 5:] == 0).all()  # and nothing after.

    run = jax.jit(apply)
    alone = run(params, tokens, Context(source_BS=source))
    changed = run(params, tokens.at[:, 5].add(1) % model.vocab_size, Context(source_BS=source))
    np.testing.assert_array_equal(alone[:, :5], changed[:, :5])
    segments = jnp.pad(jnp.ones_like(source), ((0, 0), (0, 4)))

    def padded(params, pad):
        padded_source = jnp.pad(source, ((0, 0), (0, 4)), constant_values=pad)
        return run(params, tokens, Context(source_BS=padded_source, source_segments_BS=segments))

    np.testing.assert_array_equal(padded(params, 3), padded(params, 9))
    # Sums over more places round otherwise, in proportion to the logits.
    limit = 1e-5 * float(jnp.abs(alone).max())
    np.testing.assert_allclose(padded(params, 3), alone, rtol=0, atol=limit)
    # Where the logits are about 1, that is less than 1e-6.
    small = jax.tree.map(lambda x: x / 2, params)
    alone = run(small, tokens, Context(source_BS=source))
    assert jnp.abs(alone).max() > 0.1
    np.testing.assert_allclose(padded(small, 3), alone, rtol=0, atol=1e-6)
