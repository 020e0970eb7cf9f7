"""What trains, how, and what weight decay and Muon take for a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.paths import flatten, map_with_path, unflatten
from lm.models import params as P
from lm.models.families.llama import llama
from lm.models.zoo import all_families
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW, Muon, is_kernel, muon_dimensions
from lm.train.schedule import Constant
from lm.train.state import Recipe, axes_of, new_state
from lm.train.step import train_step
from lm.train.trainable import FULL, Group, assign
from tests.train.toy import make_batch, tiny_model

RATE = 1e-2
# Kernels of attention and MLP, and how many dimensions they contract.
INPUTS = {"q": 1, "k": 1, "v": 1, "out": 2, "up": 1, "gate": 1, "down": 1}


def fresh_params(model):
    return P.init(model, jax.random.key(0))


def random_like(params, seed: int = 0):
    rng = np.random.default_rng(seed)
    return map_with_path(lambda _, x: rng.normal(size=x.shape).astype(np.float32), params)


def updates_of(optimizer, model, params, grads, table=FULL):
    recipe = Recipe(model, Generative(), optimizer, table)
    transform = recipe.transform(params)
    trained, _ = recipe.split(params)
    kept = flatten(trained)
    grads = unflatten({path: leaf for path, leaf in flatten(grads).items() if path in kept})
    state = transform.init(trained)
    updates, state = jax.jit(transform.update)(grads, state, trained)
    return flatten(updates), state


def test_decay_acts_on_kernels_only():
    """With gradients of zero the update is the decay alone: -rate * decay * kernel."""
    model = tiny_model()
    params = random_like(fresh_params(model))
    zeros = jax.tree.map(jnp.zeros_like, params)
    for optimizer in (AdamW(Constant(RATE), weight_decay=0.3), Muon(Constant(RATE), 0.3)):
        updates, _ = updates_of(optimizer, model, params, zeros)
        for path, leaf in flatten(params).items():
            decayed = path.endswith("/kernel")
            expected = -RATE * 0.3 * leaf if decayed else jnp.zeros_like(leaf)
            np.testing.assert_allclose(updates[path], expected, atol=1e-7, err_msg=path)
    decayed = {path for path in flatten(params) if is_kernel(path)}
    assert {p.split("/")[-2] for p in decayed} == {"q", "k", "v", "out", "up", "down", "head"}


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five quintic iterations on one 2-D matrix, in numpy."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        y = x @ x.T
        x = a * x + (b * y + c * y @ y) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_each_layer_as_one_matrix():
    """Stacked kernels, head dimensions flattened, against a numpy loop over layers."""
    model = llama(vocab_size=17, num_features=16, num_heads=4, num_kv_heads=2, num_layers=3,
                  mlp_features=20)  # fmt: skip
    params = fresh_params(model)
    grads = random_like(params, 1)
    updates, _ = updates_of(
        Muon(Constant(RATE), weight_decay=0.0, clip_norm=None), model, params, grads
    )
    seen = set()
    for path, grad in flatten(grads).items():
        name = path.split("/")[-2]
        if not path.startswith("stack/pattern") or name not in INPUTS:
            # Adam's first step is the sign of the gradient.
            np.testing.assert_allclose(
                updates[path], -RATE * np.sign(grad), rtol=1e-3, err_msg=path
            )
            continue
        seen.add(name)
        for layer in range(3):
            kernel = np.asarray(grad[layer], np.float64)
            rows = int(np.prod(kernel.shape[: INPUTS[name]]))
            matrix = kernel.reshape(rows, -1)
            # Nesterov's first step looks along the gradient itself.
            scale = 0.2 * np.sqrt(max(matrix.shape))
            expected = -RATE * scale * newton_schulz(matrix)
            np.testing.assert_allclose(
                np.asarray(updates[path][layer]).reshape(rows, -1), expected, atol=1e-5
            )
    assert seen == set(INPUTS)


@pytest.mark.parametrize("name", all_families())
def test_muon_dimensions_of_every_family(name):
    """Every kernel is a matrix, with the residual stream on one side where it has more sides."""
    family = all_families()[name]
    model = family.build(**family.tiny)
    axes = axes_of(model)
    for path in flatten(P.abstract(model)):
        dims = muon_dimensions(path, axes[path])
        if path.endswith("kernel") and path.split("/")[-2] in INPUTS:
            assert dims is not None, path
        if dims is not None:
            sides = dims.reduction_axis, dims.output_axis
            stacked = axes[path][0] == "layers"
            assert sorted(sides[0] + sides[1]) == list(range(int(stacked), len(axes[path])))
            if len(sides[0] + sides[1]) > 2:
                assert ("embed",) in [tuple(axes[path][d] for d in side) for side in sides], path
    assert muon_dimensions("embed/table", axes["embed/table"]) is None


def test_clipping_counts_trained_leaves_only():
    model = tiny_model()
    params = fresh_params(model)
    grads = random_like(params)
    frozen = (Group("*/mlp/*", trains=False), Group("*"))
    # With beta1 = 0 and one step, a scaled-down eps shows the norm that Adam saw in nu.
    _, state = updates_of(AdamW(Constant(RATE), clip_norm=0.5), model, params, grads, frozen)
    nu = {
        jax.tree_util.keystr(keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
        if ".nu[" in jax.tree_util.keystr(keys)
    }
    norm = np.sqrt(sum(float(leaf.sum()) / 0.05 for leaf in nu.values()))
    assert abs(norm - 0.5) <= 1e-5
    assert not any("mlp" in path for path in nu)


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_frozen_leaves_cost_nothing_and_stay(optimizer):
    """Bit for bit unchanged after ten steps with decay; moments for the trained leaves alone."""
    model = tiny_model()
    params = fresh_params(model)
    table = (Group("head/*"), Group("*/q/kernel", learning_rate=0.1), Group("*", trains=False))
    recipe = Recipe(model, Generative(), optimizer(Constant(RATE)), table)
    state = new_state(recipe, params, jax.random.PRNGKey(0))
    trained, frozen = recipe.split(params)
    sizes = [x.size for x in jax.tree.leaves(state.opt_state) if x.size > 3]
    num_trained = P.count(trained)
    matrices = sum(x.size for path, x in flatten(trained).items() if path.endswith("/q/kernel"))
    assert sum(sizes) == (2 * num_trained if optimizer is AdamW else 2 * num_trained - matrices)
    step = jax.jit(train_step, static_argnums=0)
    for index in range(10):
        state, _ = step(recipe, state, make_batch(index, 4))
    after = flatten(state.params)
    for path, leaf in flatten(frozen).items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    for path, leaf in flatten(trained).items():
        assert (np.asarray(after[path]) != np.asarray(leaf)).any(), path


@pytest.mark.perf
def test_no_gradient_is_computed_for_frozen_kernels():
    """The step's program has fewer products than that of full training."""
    model = tiny_model()
    batch = make_batch(0, 4)
    products = {}
    for name, table in {"full": FULL, "head": (Group("head/*"), Group("*", trains=False))}.items():
        recipe = Recipe(model, Generative(), AdamW(Constant(RATE)), table)
        state = new_state(recipe, fresh_params(model), jax.random.PRNGKey(0))
        text = jax.jit(train_step, static_argnums=0).lower(recipe, state, batch).as_text()
        products[name] = text.count("dot_general")
    assert products["head"] < products["full"] / 2


def test_groups_scale_learning_rates_and_decay():
    model = tiny_model()
    params = random_like(fresh_params(model))
    grads = random_like(params, 1)
    table = (
        Group("head/kernel", learning_rate=0.5, weight_decay=0.0),
        Group("*/up/*", optimizer=AdamW(Constant(7 * RATE), weight_decay=0.0)),
        Group("*"),
    )
    optimizer = AdamW(Constant(RATE), weight_decay=0.0, clip_norm=None)
    ours, _ = updates_of(optimizer, model, params, grads, table)
    plain, _ = updates_of(optimizer, model, params, grads)
    for path, update in ours.items():
        factor = 0.5 if path == "head/kernel" else 7 if "/up/" in path else 1
        np.testing.assert_allclose(update, factor * plain[path], rtol=1e-5, err_msg=path)


def test_the_first_group_that_fits_decides():
    params = {"a": {"kernel": 1, "bias": 2}, "b": 3}
    table = (Group("a/*"), Group("*", trains=False))
    assert assign(table, params) == {"a/kernel": 0, "a/bias": 0, "b": 1}
    for wrong, message in [
        ((Group("a/*"),), "no group .* fits the parameter b"),
        ((Group("c/*"), Group("*")), "'c/\\*' .* has no parameter"),
        ((Group("*"), Group("a/*")), "groups before it take them all"),
        ((Group("*", trains=False),), "nothing trains"),
    ]:
        with pytest.raises(ValueError, match=message):
            assign(wrong, params)
