"""An adapter is merged only where the merged model computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.paths import flatten, map_with_path, unflatten
from lm.interop import hf, merge
from lm.interop.loaded import Loaded
from lm.models import adapters, tasks
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.encoder import TwoTower
from lm.models.families.bert import bert
from lm.models.families.llama import llama
from tests.conformance.harness import tiny
from tests.models.test_adapters import LORAS, adapted
from tests.parity.hf import ids

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@pytest.mark.ledger("D09")
@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "dora"),
        pytest.param("gpt2", "lora", marks=pytest.mark.slow),
        pytest.param("mamba", "lora", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_merged_export_equals_base_and_adapter(name, kind, tmp_path):
    """Read again here, and by transformers."""
    model, params = tiny(name)
    loaded = Loaded(model, adapted(model, params, LORAS[kind]))
    path = merge.save_directory(loaded, tmp_path / "out")
    assert not (path / "adapter_config.json").exists()
    tokens = ids(model.vocab_size)
    ours = np.asarray(loaded.logits(tokens))
    assert np.abs(ours - np.asarray(Loaded(model, params).logits(tokens))).max() > 1e-2
    assert np.abs(np.asarray(hf.load_directory(path).logits(tokens)) - ours).max() <= 1e-5
    module = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        theirs = module(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(theirs - ours).max() <= 1e-5


def test_drift_is_the_largest_difference():
    model, params = tiny("llama")
    moved = map_with_path(lambda path, leaf: leaf * (1.01 if "head" in path else 1), params)
    difference, largest = merge.drift(model, params, moved)
    draw = np.random.default_rng(0).integers
    tokens = draw(0, 61, (2, merge.ROWS, merge.LENGTH), dtype=np.int32)[0]
    logits = Loaded(model, params).logits(tokens)
    assert abs(largest - float(jnp.abs(logits).max())) <= 1e-5
    assert abs(difference - 0.01 * largest) <= 1e-5 * largest


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "encoder",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "sequence", "two towers")),
    ],
)
def test_all_outputs_are_compared(name):
    """Each kernel that an adapter can change moves what is looked at."""
    size = dict(num_features=16, num_heads=2, num_layers=1, mlp_features=8)
    encoder = bert(61, **size)
    model = {
        "bert": lambda: encoder,
        "encoder": lambda: bert(61, **size, heads=None),
        "two towers": lambda: TwoTower(*2 * (bert(61, **size, heads=None),)),
        "t5": lambda: tiny("t5")[0],
        "sequence": lambda: tasks.for_task(llama(61, **size), "sequence", 3),
    }[name]()
    params = P.init(model, jax.random.key(0))
    flat = flatten(params)
    for path in adapters.kernels(model):
        moved = unflatten({**flat, path: 9 * flat[path]})
        assert merge.drift(model, params, moved)[0] > 0, path


@pytest.mark.slow
def test_drift_is_refused_with_its_size(tmp_path):
    """Rounded to bfloat16, the kernels move more than is allowed; what is not a number too."""
    model, params = tiny("llama")
    params = adapted(model, params, LoRA(4, alpha=64))
    rounded = map_with_path(lambda _, leaf: leaf.astype(jnp.bfloat16), params)
    loaded = Loaded(model, rounded, dtype="bfloat16")
    difference, largest = merge.drift(model, rounded, adapters.merge(rounded))
    assert difference > merge.BOUND * largest
    with pytest.raises(ValueError, match=f"moves logits by up to {difference:.3g}, and .* float32"):
        merge.save_directory(loaded, tmp_path / "out")
    broken = map_with_path(lambda p, leaf: leaf / 0 if p.endswith("q/lora_b") else leaf, params)
    with pytest.raises(ValueError, match="moves logits by up to nan"):
        merge.merged(Loaded(model, broken))
    with pytest.raises(ValueError, match="hold no adapter"):
        merge.merged(Loaded(*tiny("llama")))
    assert not list(tmp_path.iterdir())
