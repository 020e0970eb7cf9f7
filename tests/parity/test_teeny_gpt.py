"""teenyGPT equals torch's post-norm encoder layers between its embeddings and its head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import flatten, unflatten
from lm.models import params as P
from lm.models.families.teeny_gpt import FAMILY, teeny_gpt
from lm.ops.rotary import Rotary
from tests.conformance.harness import forward

torch = pytest.importorskip("torch")

from tests.parity.hf import ids, randomize  # noqa: E402


class Reference(torch.nn.Module):
    """Embedding and position, `TransformerEncoder` of exact-GELU post-norm layers, linear head."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(
            32, 8, 4096, dropout=0.0, activation="gelu", batch_first=True, norm_first=False
        )
        self.embed = torch.nn.Embedding(29, 32)
        self.positions = torch.nn.Embedding(150, 32)
        self.stack = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = torch.nn.Linear(32, 29)

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.embed(tokens) + self.positions(torch.arange(T))
        x = self.stack(x, mask=torch.ones(T, T).triu(1).bool())
        return torch.log_softmax(self.head(x), -1)


def ours_of(tensors: dict[str, np.ndarray]) -> dict:
    """Lays torch's tensors (or their gradients) out as our parameters."""

    def stacked(name, shape=None, transpose=False, rows=slice(None)):
        arrays = [tensors[f"stack.layers.{i}.{name}"][rows] for i in range(4)]
        arrays = [a.T if transpose else a for a in arrays]
        return np.stack([a if shape is None else a.reshape(shape) for a in arrays])

    block = {}
    for i, q in enumerate("qkv"):
        rows = slice(32 * i, 32 * (i + 1))
        block[f"mixer/layer/{q}/kernel"] = stacked(
            "self_attn.in_proj_weight", (32, 8, 4), True, rows
        )
        block[f"mixer/layer/{q}/bias"] = stacked("self_attn.in_proj_bias", (8, 4), rows=rows)
    block["mixer/layer/out/kernel"] = stacked("self_attn.out_proj.weight", (8, 4, 32), True)
    block["mixer/layer/out/bias"] = stacked("self_attn.out_proj.bias")
    for ours, theirs in (("mixer", "norm1"), ("mlp", "norm2")):
        block[f"{ours}/norm/scale"] = stacked(f"{theirs}.weight")
        block[f"{ours}/norm/bias"] = stacked(f"{theirs}.bias")
    for ours, theirs in (("up", "linear1"), ("down", "linear2")):
        block[f"mlp/layer/{ours}/kernel"] = stacked(f"{theirs}.weight", transpose=True)
        block[f"mlp/layer/{ours}/bias"] = stacked(f"{theirs}.bias")
    return unflatten(
        {
            "embed/table": tensors["embed.weight"],
            "stack/entry/positions/table": tensors["positions.weight"],
            "head/kernel": tensors["head.weight"].T,
            "head/bias": tensors["head.bias"],
            **{f"stack/pattern/blocks_0/{path}": leaf for path, leaf in block.items()},
        }
    )


@pytest.mark.ledger("B65")
def test_equals_torch():
    """Log-probabilities to 1e-5, gradients to 1e-4, every parameter random."""
    theirs = randomize(Reference())
    model = teeny_gpt()
    params = ours_of({k: v.detach().numpy() for k, v in theirs.named_parameters()})
    assert P.count(params) == P.count(model) == 1_089_181
    shapes = {path: leaf.shape for path, leaf in flatten(P.abstract(model)).items()}
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == shapes

    tokens = ids(29, (4, 150), low=0)
    expected = theirs(torch.from_numpy(tokens).long())
    targets = torch.from_numpy(tokens[:, 1:]).long()
    torch.nn.functional.nll_loss(expected[:, :-1].transpose(1, 2), targets).backward()

    def loss(params):
        logits, _ = model.apply({"params": params}, jnp.asarray(tokens))
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs[:, :-1], jnp.asarray(tokens)[:, 1:, None], -1)
        return -picked.mean(), log_probs

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.abs(np.asarray(ours) - expected.detach().numpy()).max() <= 1e-5
    torch_grads = flatten(ours_of({k: v.grad.numpy() for k, v in theirs.named_parameters()}))
    for path, grad in flatten(grads).items():
        assert np.abs(np.asarray(grad) - torch_grads[path]).max() <= 1e-4, path


@pytest.mark.ledger("B66")
def test_counts_of_the_three_readings():
    """The multiplier 128 is not a width of 128, and the notebook's 512 is a third model."""
    assert P.count(FAMILY.preset("post")) == 1_089_181
    assert P.count(FAMILY.preset("prose")) == 57_501
    assert P.count(FAMILY.preset("notebook")) == 4_284_061


def test_initial_distribution_is_torchs():
    """Standard deviation of every leaf within 4 standard errors of torch's own initialisation."""
    torch.manual_seed(0)
    theirs = flatten(ours_of({k: v.detach().numpy() for k, v in Reference().named_parameters()}))
    ours = flatten(P.init(teeny_gpt(), jax.random.key(0)))
    for path, leaf in ours.items():
        a, b = float(np.std(leaf)), float(np.std(theirs[path]))
        assert abs(a - b) <= 4 * b / np.sqrt(leaf.size) + 1e-8, (path, a, b)


def test_has_no_foreign_form():
    with pytest.raises(ValueError, match="no Hugging Face"):
        FAMILY.write_config(teeny_gpt())


def test_rotary_positions_replace_the_learned_ones():
    """There is no table of positions, and only distances count: a shift changes nothing."""
    model = teeny_gpt(max_length=64, mlp_multiplier=4, rotary=Rotary(100.0))
    params = P.init(model, jax.random.key(0))
    assert P.count(teeny_gpt(max_length=64, mlp_multiplier=4)) - P.count(params) == 64 * 32
    tokens = jnp.asarray(ids(29, (2, 30), low=0))
    positions = jnp.broadcast_to(jnp.arange(30), (2, 30))
    logits, _ = forward(model, params, tokens, Context(positions_BT=positions))
    shifted, _ = forward(model, params, tokens, Context(positions_BT=positions + 17))
    np.testing.assert_allclose(shifted, logits, atol=1e-5)
    stretched, _ = forward(model, params, tokens, Context(positions_BT=positions * 2))
    assert jnp.abs(stretched - logits).max() > 1e-2
