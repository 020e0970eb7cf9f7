"""Parity with a Hugging Face class: every parameter random, both directions, gradients too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lm.core.context import Context
from lm.core.paths import flatten
from lm.models import params as P
from lm.models.family import Family
from lm.models.foreign import read_weights, write_weights
from tests.conformance.harness import forward


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Moves every parameter away from its initial value: norms are 1 and biases 0 there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter += noise / max(1.0, parameter.shape[-1] ** 0.5 * std)
    return module.eval()


def tensors_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns what `save_pretrained` would write: the state dict without tied duplicates."""
    tied = getattr(module, "_tied_weights_keys", None) or {}
    tied = set(tied) if module.config.tie_word_embeddings else set()
    return {k: v.detach().numpy() for k, v in module.state_dict().items() if k not in tied}


def import_torch(family: Family, module: torch.nn.Module):
    """Returns our model and parameters of a torch module, through its config and tensors."""
    model = family.read_config(
        module.config.to_diff_dict() | {"model_type": module.config.model_type}
    )
    params = read_weights(
        family.weights(model), tensors_of(module), P.abstract(model), family.ignore
    )
    return model, jax.tree.map(jnp.asarray, params)


def assert_round_trip(family: Family, module: torch.nn.Module, model, params) -> None:
    """Our export loads into the class strictly, and is bit for bit what came."""
    exported = write_weights(family.weights(model), params)
    original = tensors_of(module)
    assert exported.keys() <= original.keys()
    assert all(any_match(family.ignore, k) for k in original.keys() - exported.keys())
    for name, array in exported.items():
        np.testing.assert_array_equal(array, original[name], err_msg=name)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in exported.items()}
    fresh = type(module)(module.config)
    missing, unexpected = fresh.load_state_dict(tensors, strict=False)
    tied = set(getattr(module, "_tied_weights_keys", None) or {})
    assert not unexpected
    assert all(name in tied or any_match(family.ignore, name) for name in missing)
    assert family.read_config(family.write_config(model)) == model


def any_match(patterns, name: str) -> bool:
    return any(re.fullmatch(p, name) for p in patterns)


def assert_counts(module: torch.nn.Module, params) -> None:
    assert P.count(params) == sum(p.numel() for p in module.parameters())


def ids(vocab_size: int, shape=(2, 24), seed: int = 0, low: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, vocab_size, shape).astype(np.int32)


def right_padded(shape=(2, 24), pad: int = 7) -> np.ndarray:
    """A mask of ones whose last row ends in padding."""
    mask = np.ones(shape, np.int32)
    mask[-1, -pad:] = 0
    return mask


def assert_causal_lm_parity(family: Family, module: torch.nn.Module, tolerance: float = 1e-4):
    """Logits, loss gradients, count and round trip of a causal language model."""
    model, params = import_torch(family, module)
    assert_counts(module, params)
    assert_round_trip(family, module, model, params)
    tokens, mask = ids(module.config.vocab_size), right_padded()
    with torch.no_grad():
        theirs = module(
            input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)
        ).logits.numpy()
    ctx = Context(segments_BT=jnp.asarray(mask))
    ours, _ = forward(model, params, jnp.asarray(tokens), ctx)
    assert np.abs(np.where(mask[..., None], np.asarray(ours) - theirs, 0)).max() <= tolerance
    assert_causal_gradients(family, module, model, params, tokens)


def assert_causal_gradients(family, module, model, params, tokens, tolerance: float = 1e-4):
    """Gradients of the mean next-token loss, leaf by leaf, relative to the largest."""
    long = torch.from_numpy(tokens).long()
    module.zero_grad()
    loss = module(input_ids=long, labels=long, use_cache=False).loss
    loss.backward()

    def our_loss(params):
        logits, _ = model.apply({"params": params}, jnp.asarray(tokens))
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    value, grads = jax.jit(jax.value_and_grad(our_loss))(params)
    assert abs(float(value) - loss.item()) <= 1e-5
    assert_gradients(family, module, model, params, grads, tolerance)


def assert_gradients(family, module, model, params, grads, tolerance: float = 1e-4) -> None:
    """`grads` equal the `.grad` of every parameter, mapped through the family's own table."""
    kept = tensors_of(module).keys()
    theirs = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
        for name, p in module.named_parameters()
        if name in kept
    }
    theirs = flatten(read_weights(family.weights(model), theirs, P.abstract(model), family.ignore))
    largest = max(np.abs(g).max() for g in theirs.values())
    for path, grad in flatten(grads).items():
        error = np.abs(np.asarray(grad) - theirs[path]).max()
        assert error <= tolerance * largest, f"{path}: {error} of {largest}"
