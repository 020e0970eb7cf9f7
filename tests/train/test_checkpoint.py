"""Checkpoints: exact, whole or not at all, for any mesh, and clear about what is wrong."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm.core.mesh import MeshShape, make_mesh
from lm.train.checkpoint import CheckpointError, Checkpoints, load_params
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW, Muon
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state, init_state, state_shardings
from lm.train.step import jit_step
from tests.train.toy import VOCAB_SIZE, make_batch, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = Recipe(
    tiny_model(vocab_size=VOCAB_SIZE + 1), Generative(), Muon(Constant(1e-2)), micro_batches=1
)
OTHER = Recipe(tiny_model(num_features=32), Generative(), AdamW(Constant(1e-2)))


@pytest.fixture(scope="module")
def state():
    return init_state(RECIPE, 0, make_mesh())


def abstract(recipe: Recipe, shape: MeshShape = MeshShape()):
    shapes = abstract_state(recipe)
    shardings = state_shardings(recipe, make_mesh(shape), shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def saved(directory, state, steps=(5,), losses=(None,), keep=2) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep)
    for step, loss in zip(steps, losses):
        checkpoints.save(state, step, {"data_position": step}, loss)
    checkpoints.wait()
    return checkpoints


def test_restores_bit_for_bit(tmp_path, state):
    checkpoints = saved(tmp_path / "c", state)
    back = checkpoints.restore(abstract(RECIPE), 5)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert checkpoints.meta(5) == {"data_position": 5}
    params, step = load_params(tmp_path / "c", abstract_state(RECIPE).params)
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.ledger("D08")
@pytest.mark.parametrize(
    "shape", [MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=2, fsdp=4)], ids=str
)
def test_restores_to_another_mesh(tmp_path, state, shape):
    """Eight ways of data parallelism come back divided over fsdp and tensor, and step alike."""
    checkpoints = saved(tmp_path / "c", state)
    back = checkpoints.restore(abstract(RECIPE, shape), 5)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    kernel = back.params["head"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    batch = make_batch(0, 16)
    _, ours = jit_step(RECIPE, make_mesh(shape))(back, batch)
    _, theirs = jit_step(RECIPE, make_mesh())(jax.tree.map(lambda x: x.copy(), state), batch)
    np.testing.assert_allclose(ours["loss"][0], theirs["loss"][0], rtol=1e-6)


def test_what_is_saved_is_what_was_given(tmp_path):
    """The next step takes the state's buffers while the checkpoint is still being written."""
    recipe = Recipe(
        tiny_model(num_features=64, mlp_multiplier=16), Generative(), AdamW(Constant(1e-2))
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    state, step = init_state(recipe, 0, mesh), jit_step(recipe, mesh)
    checkpoints = Checkpoints(tmp_path / "c")
    for index in range(3):
        expected = jax.tree.map(np.array, state)
        checkpoints.save(state, index, {})
        for _ in range(3):
            state, _ = step(state, make_batch(index, 8))
        jax.block_until_ready(state)
        checkpoints.wait()
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        back = checkpoints.restore(targets, index)
        jax.tree.map(np.testing.assert_array_equal, back, expected)


def test_keeps_the_newest_and_the_best(tmp_path, state):
    steps, losses = (5, 10, 15, 20, 25), (3.0, 2.0, None, 2.5, None)
    checkpoints = saved(tmp_path / "c", state, steps, losses)
    assert checkpoints.steps() == [10, 20, 25]
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert (again.best(), again.latest()) == (10, 25)
    # The best is remembered by the next process, too.
    for step in (30, 35):
        again.save(state, step, {}, 2.2)
    again.wait()
    assert again.steps() == [10, 30, 35]
    assert load_params(tmp_path / "c", abstract_state(RECIPE).params)[1] == 10


@pytest.mark.ledger("D08")
def test_a_half_written_checkpoint_is_none(tmp_path, state):
    checkpoints = saved(tmp_path / "c", state)
    checkpoints.close()
    half = tmp_path / "c" / "10.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    (half / "params" / "manifest.ocdbt").write_bytes(b"half")
    again = Checkpoints(tmp_path / "c")
    assert again.latest() == 5
    again.save(state, 10, {})
    again.wait()
    assert again.latest() == 10 and not half.exists()
    jax.tree.map(np.testing.assert_array_equal, again.restore(abstract(RECIPE), 10), state)


def test_another_model_is_refused(tmp_path, state):
    saved(tmp_path / "c", state)
    message = r"another model: embed/table is .12, 16. there and .11, 32. here"
    with pytest.raises(CheckpointError, match=message):
        load_params(tmp_path / "c", abstract_state(OTHER).params)
    with pytest.raises(CheckpointError, match="of another model"):
        Checkpoints(tmp_path / "c").restore(abstract(OTHER), 5)
    with pytest.raises(CheckpointError, match=r"steps \[5\], not 7"):
        load_params(tmp_path / "c", abstract_state(RECIPE).params, 7)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    params = abstract_state(RECIPE).params
    with pytest.raises(CheckpointError, match="there is no directory"):
        load_params(tmp_path / "none", params)
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_params(tmp_path / "empty", params)
    (tmp_path / "foreign" / "7").mkdir(parents=True)
    (tmp_path / "foreign" / "7" / "pytorch_model.bin").write_bytes(b"foreign")
    with pytest.raises(CheckpointError, match="not a checkpoint of this package"):
        load_params(tmp_path / "foreign", params)


@pytest.mark.parametrize("what", ["params", "rest", "meta"])
def test_a_damaged_checkpoint_is_refused(tmp_path, state, what):
    """Every file of one item cut to half of its size."""
    checkpoints = saved(tmp_path / "c", state)
    for file in (tmp_path / "c" / "5" / what).rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this package, or is damaged"):
        if what == "meta":
            checkpoints.meta(5)
        checkpoints.restore(abstract(RECIPE), 5)


FULL_DISK = """
import resource, signal, sys
import jax
from lm.train.checkpoint import Checkpoints, CheckpointError
from lm.train.state import init_state
from lm.core.mesh import make_mesh
from tests.train.test_checkpoint import RECIPE

state = init_state(RECIPE, 0, make_mesh())
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(state, 5, {})
checkpoints.wait()
# Any file beyond 2000 bytes fails to be written, as it does on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    checkpoints.save(state, 10, {})
    checkpoints.wait()
except CheckpointError as error:
    print(error, file=sys.stdout)
"""


def test_a_full_disk_spares_the_checkpoint_before(tmp_path, state):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert "could not be written" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "the one of step 5 is whole" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest() == 5
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(RECIPE), 5), state)
