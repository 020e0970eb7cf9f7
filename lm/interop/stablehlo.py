"""StableHLO artefacts: a decoder as two compiled functions that run without this package.

A directory holds `prefill.bin` and `decode.bin`, which `jax.export.deserialize` reads, the weights
as safetensors, by our parameter paths, a manifest that names every input and output, and a README
with a program that generates from them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from lm.core.context import Context
from lm.core.paths import flatten, unflatten
from lm.data.char_library import library_form
from lm.interop.directory import refuse_existing, whole_directory, write_json
from lm.interop.hf import save_tensors, token_ids
from lm.interop.loaded import Loaded
from lm.models.decoder import Decoder

Array = jax.Array
FORMAT = "lm.stablehlo.v1"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Where a model has no longest sequence, or a cache of it would be large.
USUAL_LENGTH = 1024
README = """# {name}, as StableHLO

`manifest.json` says what the two functions take and return; the batch may have any size, and the
lengths are fixed. This generates greedily, with jax, flatbuffers and safetensors alone:

```python
import json
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
from safetensors.flax import load_file

folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
weights = {{}}
for file in folder.glob("*.safetensors"):
    weights |= load_file(file)
prefill, decode = (
    jax.jit(jax.export.deserialize(bytearray((folder / f"{{name}}.bin").read_bytes())).call)
    for name in ("prefill", "decode")
)


def generate(prompts, count):
    # Prompts stand on the right of their rows, behind padding, which is segment 0.
    shape = (len(prompts), manifest["prompt_length"])
    tokens, segments = jnp.zeros((2, *shape), jnp.int32)
    for row, ids in enumerate(prompts):
        tokens = tokens.at[row, -len(ids) :].set(jnp.array(ids))
        segments = segments.at[row, -len(ids) :].set(1)
    logits, state = prefill(weights, tokens, segments)
    new = [logits.argmax(-1).astype(jnp.int32)]
    while len(new) < count:
        logits, state = decode(weights, new[-1], state)
        new.append(logits.argmax(-1).astype(jnp.int32))
    return jnp.stack(new, axis=1).tolist()


print(json.dumps(generate(json.loads(sys.argv[2]), int(sys.argv[3]))))
```

    python generate.py . '[[1, 5, 3], [7, 2]]' 20
"""


def save_directory(
    loaded: Loaded,
    path: str | Path,
    *,
    prompt_length: int | None = None,
    cache_length: int | None = None,
) -> Path:
    """Writes a decoder as StableHLO, whole or not at all.

    Args:
      loaded: a model, with an adapter or without, in the dtype to store and to compute in.
      path: a new directory.
      prompt_length: places that prefill reads, shorter prompts being padded on the left; None is
        half of `cache_length`.
      cache_length: places that the decoding state holds, padding, prompt and new tokens together;
        None is what the model has positions for, and at most `USUAL_LENGTH`.

    Raises:
      ValueError: if the model is no decoder with a head over the vocabulary, a length does not fit,
        or `path` exists.
    """
    path, model = Path(path), loaded.model
    refuse_existing(path)
    if not isinstance(model, Decoder) or not model.causal or model.head is None:
        raise ValueError(
            "StableHLO artefacts are of decoders with a head over the vocabulary, and this is "
            f"{type(model).__name__}{'' if getattr(model, 'head', None) else ' without one'}"
        )
    cache_length = cache_length or min(model.max_length or USUAL_LENGTH, USUAL_LENGTH)
    prompt_length = prompt_length or max(1, cache_length // 2)
    longest = min(cache_length, model.max_length or cache_length)
    if not 1 <= prompt_length <= longest:
        raise ValueError(
            f"a prompt of {prompt_length} places does not fit: the cache has {cache_length}, and "
            f"the model {model.max_length or 'any number of'} positions"
        )
    tensors = {name: np.asarray(leaf) for name, leaf in flatten(loaded.params).items()}
    programs, about = lower(loaded, tensors, prompt_length, cache_length)
    manifest = {
        "format": FORMAT,
        "jax": jax.__version__,
        "dtype": loaded.dtype,
        "batch": "symbolic",
        "prompt_length": prompt_length,
        "cache_length": cache_length,
        "max_length": model.max_length,
        "vocab_size": model.vocab_size,
        **({} if loaded.tokenizer is None else token_ids(loaded.tokenizer)),
        "weights": {name: _about(array) for name, array in tensors.items()},
        **about,
    }
    with whole_directory(path) as scratch:
        for name, program in programs.items():
            (scratch / f"{name}.bin").write_bytes(program.serialize())
        save_tensors(tensors, scratch)
        write_json(scratch / "manifest.json", manifest)
        (scratch / "README.md").write_text(README.format(name=loaded.name or path.name))
        if loaded.tokenizer is not None:
            library_form(loaded.tokenizer).save(scratch)
    return path


def lower(
    loaded: Loaded, tensors: Mapping[str, np.ndarray], prompt_length: int, cache_length: int
) -> tuple[dict[str, jax.export.Exported], dict[str, Any]]:
    """Returns the two programs by name, and what they take and return besides the weights."""
    prefill, decode = functions(loaded.model, loaded.dtype, cache_length)
    (rows,) = jax.export.symbolic_shape("b")
    prompt = jax.ShapeDtypeStruct((rows, prompt_length), jnp.int32)
    token = jax.ShapeDtypeStruct((rows,), jnp.int32)
    weights = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in tensors.items()}
    first = jax.export.export(jax.jit(prefill), platforms=PLATFORMS)(weights, prompt, prompt)
    logits, state = jax.eval_shape(prefill, weights, prompt, prompt)
    second = jax.export.export(jax.jit(decode), platforms=PLATFORMS)(weights, token, state)
    outputs = {"logits": _about(logits), "state": {n: _about(leaf) for n, leaf in state.items()}}
    about = {
        "prefill": {"inputs": {"tokens": _about(prompt), "segments": _about(prompt)}},
        "decode": {"inputs": {"token": _about(token), "state": outputs["state"]}},
    }
    about = {name: {**each, "outputs": outputs} for name, each in about.items()}
    return {"prefill": first, "decode": second}, about


def functions(model: Decoder, dtype: str, cache_length: int) -> tuple[Callable, Callable]:
    """Returns prefill and one decoding step, over flat dicts of parameters and of state.

    Returns:
      `prefill(weights, tokens_BT, segments_BT)` and `decode(weights, token_B, state)`; both return
      the (B, V) fp32 logits of the next token, and the state.
    """
    # A scan is the same program for every platform, and small.
    ctx = Context(dtype=dtype, unroll=1)

    def answer(weights: Mapping[str, Array], tokens_BT: Array, ctx: Context, state: Any = None):
        params = {"params": unflatten(weights)}
        x_BTD, state = model.apply(params, tokens_BT, ctx, state, method="hidden")
        logits_B1V = model.apply(params, x_BTD[:, -1:], ctx, method="unembed")
        return logits_B1V[:, 0].astype(jnp.float32), state

    def prefill(weights: Mapping[str, Array], tokens_BT: Array, segments_BT: Array):
        inner = ctx.replace(segments_BT=segments_BT, cache_length=cache_length)
        logits_BV, state = answer(weights, tokens_BT, inner)
        return logits_BV, _flat(state)

    def decode(weights: Mapping[str, Array], token_B: Array, state: Mapping[str, Array]):
        one = jax.ShapeDtypeStruct((*token_B.shape, 1), jnp.int32)
        _, like = jax.eval_shape(
            lambda w, t: answer(w, t, ctx.replace(cache_length=cache_length)), weights, one
        )
        leaves = [state[name] for name in _flat(like)]
        whole = jax.tree.unflatten(jax.tree.structure(like), leaves)
        logits_BV, whole = answer(weights, token_B[:, None], ctx, whole)
        return logits_BV, _flat(whole)

    return prefill, decode


def _flat(state: Any) -> dict[str, Any]:
    """Returns the leaves of a decoding state by their paths, 'layers/pattern/0/mixer/k'."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _about(array: Any) -> dict[str, Any]:
    """Returns the shape and dtype of an array as JSON; 'b' is the batch."""
    shape = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {"shape": shape, "dtype": str(array.dtype)}
