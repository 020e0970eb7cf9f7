"""Generation with several adapters beside one base: each prompt has its own, at every step."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from lm.infer.generate import generate_tokens, stream_tokens
from lm.interop.loaded import Loaded
from lm.models import adapters
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.zoo import get_family
from tests.infer.test_generate import rows_of
from tests.models.test_adapters import EVERY, adapted

KINDS = (
    LoRA(2, targets=("*/out/kernel",)),
    LoRA(4, targets=EVERY, dora=True),
    LoRA(3, targets=("*/up/*", "*/out/*")),
)
IDS = (1, -1, 0, 2, 1)
LENGTHS = (13, 13, 1, 5, 13)


@cache
def with_three(name):
    """Returns a model and its parameters: bare, with three adapters, and with each alone."""
    model = get_family(name).build(**{**get_family(name).tiny, "num_layers": 1})

    @jax.jit
    def make():
        # Larger than they start, so that adapters matter more than what is drawn.
        params = jax.tree.map(lambda leaf: 5 * leaf, P.init(model, jax.random.key(0)))
        all_three = [adapted(model, params, lora, seed) for seed, lora in enumerate(KINDS)]
        several = adapters.stack(params, [adapters.split(one)[1] for one in all_three])
        return params, several, [adapters.select(several, number) for number in range(3)]

    return model, *make()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mamba", "t5")]


@pytest.mark.parametrize("name", ["llama", *SLOW])
@pytest.mark.slow
def test_each_prompt_has_its_adapter(name, compilations):
    """A mixed batch gives what each adapter gives alone; other numbers compile nothing."""
    model, params, several, alone = with_three(name)
    side = "source" if name == "t5" else "prompts"
    rows = rows_of(LENGTHS, model.vocab_size)
    rows[1] = rows[0]
    keys = jax.random.split(jax.random.key(3), len(IDS))
    keys = keys.at[1].set(keys[0])

    def run(params, select=slice(None), **options):
        return generate_tokens(
            model, params, **{side: rows[select]}, keys=keys[select], max_new_tokens=9, **options
        ).rows()

    together = run(several, adapters=IDS)
    assert together[0] != together[1]  # The same prompt and key, with an adapter and without.
    base = run(params)
    assert together[1] == base[1]
    for number in range(3):
        chosen = run(alone[number])
        for row, index in enumerate(IDS):
            assert index != number or together[row] == chosen[row] != base[row]
    assert run(several, adapters=IDS, cache=False) == together
    with compilations() as compiled:
        assert run(several, adapters=-1) == base
        assert run(several, adapters=IDS[::-1])[2] == together[2]
    assert compiled == []


@pytest.mark.slow
def test_streaming_and_logits_choose_too():
    model, _, several, (_, _, last) = with_three("llama")
    (prompt,) = rows_of((6,), model.vocab_size)
    options = dict(max_new_tokens=5, temperature=0.0)
    run = partial(generate_tokens, model, several, [prompt] * 3, **options)
    rows = run(adapters=[2, 0, -1]).rows()
    assert list(stream_tokens(model, several, prompt, adapters=2, **options)) == rows[0]
    loaded = Loaded(model, several)
    both = loaded.logits([prompt] * 2, adapters=[2, -1])
    assert [int(row[-1].argmax()) for row in both] == [rows[0][0], rows[2][0]]
    alone = Loaded(model, last)
    np.testing.assert_allclose(alone.logits([prompt] * 2, adapters=[0, -1]), both, atol=1e-5)


def test_a_wrong_choice_is_named():
    model, params, several, (one, _, _) = with_three("llama")
    for given, choice, message in [
        (several, None, "has 3 adapters: choose with adapters=, .* 0 to 2, or -1 for the base"),
        (several, 3, "no adapter 3: this model has 0 to 2, and -1 is the base alone"),
        (several, [0, -2], "no adapter -2"),
        (one, [1, 0], "no adapter 1: this model has 0 to 0"),
        (several, [0], r"one integer, or 2, one for each row, not \[0\]"),
        (several, [0.0, 1.0], "one integer"),
        (params, 0, r"no adapter to choose: open it with lm.load\(path, adapter="),
    ]:
        with pytest.raises(ValueError, match=message):
            generate_tokens(model, given, [[1], [2]], max_new_tokens=2, adapters=choice)
        with pytest.raises(ValueError, match=message):
            Loaded(model, given).logits([[1], [2]], adapters=choice)
