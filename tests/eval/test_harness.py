"""Tasks of lm-evaluation-harness, answered by our backend and by its own for transformers."""

import dataclasses
import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lm.data.tokenizer import teeny_gpt_tokenizer, train_bpe
from lm.infer.score import encode_pair
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.ops.rotary import Rotary
from tests.conformance.harness import FAMILIES, random_params

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lm.eval import harness  # noqa: E402
from lm.eval.harness import LmEvalModel  # noqa: E402

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "house", "and", "it", "red"]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def sentence(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def loaded():
    """A tiny llama with random parameters, and a tokenizer whose texts start with no token."""
    rng = random.Random(0)
    tokenizer = train_bpe([sentence(rng, 12) + ".\n" for _ in range(200)], 300)
    tokenizer = dataclasses.replace(tokenizer, starts=False, chat_template=CHAT)
    sizes = dict(vocab_size=300, num_layers=1, rotary=Rotary(500.0))
    model = FAMILIES["llama"].build(**{**FAMILIES["llama"].tiny, **sizes})
    return Loaded(model, random_params(model), tokenizer, name="tiny/llama")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three local tasks: multiple choice, rolling perplexity, and generation."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(1)
    docs = [
        {
            "query": sentence(rng, rng.randint(1, 12)),
            "choices": [sentence(rng, rng.randint(1, 5)) for _ in range(3)],
            "gold": rng.randrange(3),
            "text": sentence(rng, rng.randint(70, 90)),  # More than one window of 64 tokens.
        }
        for _ in range(12)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"data_files": {"test": str(folder / "docs.jsonl")}}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    def metrics(*names):
        return [{"metric": name} for name in names]

    return [
        common | {
            "task": "our_choice", "output_type": "multiple_choice", "doc_to_text": "query",
            "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": metrics("acc", "acc_norm"),
        },
        common | {
            "task": "our_text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "text", "metric_list": metrics("word_perplexity", "bits_per_byte"),
        },
        common | {
            "task": "our_reply", "output_type": "generate_until", "doc_to_text": "query",
            "doc_to_target": "gold", "metric_list": metrics("exact_match"),
            "generation_kwargs": {"until": [" sat", "\n"], "max_gen_toks": 16},
        },
    ]  # fmt: skip


def run(model, tasks):
    """Results and samples of `simple_evaluate`, without the harness's own tasks."""
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=[dict(task) for task in tasks], task_manager=manager, bootstrap_iters=0
    )


@pytest.mark.slow
def test_tasks_give_what_the_backend_of_transformers_gives(loaded, tasks, tmp_path):
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    path = hf.save_directory(loaded, tmp_path / "out")
    ours = run(LmEvalModel(loaded, batch_size=12), tasks)
    theirs = run(HFLM(str(path), device="cpu", batch_size=1, dtype="float32"), tasks)
    assert ours["results"].keys() == {"our_choice", "our_text", "our_reply"}
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task, samples in theirs["samples"].items():
        assert len(samples) == len(ours["samples"][task]) == 12
        for theirs_one, ours_one in zip(samples, ours["samples"][task]):
            if task == "our_reply":
                assert ours_one["resps"] == theirs_one["resps"]
                continue
            found, expected = (
                np.array(one["filtered_resps"], np.float64) for one in (ours_one, theirs_one)
            )
            np.testing.assert_allclose(found, expected, atol=1e-3)
    replies = [one["resps"][0][0] for one in ours["samples"]["our_reply"]]
    assert len(set(replies)) > 3 and not any(" sat" in text or "\n" in text for text in replies)


def test_our_pairs_are_those_of_the_harness(loaded, monkeypatch):
    """`encode_pair`, which is written without the harness, cuts as `TemplateLM` does."""
    rng, model, seen = random.Random(2), LmEvalModel(loaded), []
    pairs = [("", " the cat"), ("the ", "cat"), ("the\n \n", "cat"), ("the ca", "t sat")]
    for _ in range(200):
        text = sentence(rng, 8) + rng.choice(["", " ", "\n\n", " é漢🙂", "  "])
        cut = rng.randint(1, len(text) - 1)
        pairs.append((text[:cut] + rng.choice(["", " ", "  "]), text[cut:] + " mat"))
    monkeypatch.setattr(
        LmEvalModel, "_loglikelihood_tokens", lambda self, requests, **_: seen.extend(requests)
    )
    for starts in (False, True):
        tokenizer = dataclasses.replace(loaded.tokenizer, starts=starts)
        it = dataclasses.replace(loaded, tokenizer=tokenizer)
        model, seen[:] = LmEvalModel(it), []
        model.loglikelihood(requests_of(*pairs), disable_tqdm=True)
        assert [(context, continuation) for _, context, continuation in seen] == [
            encode_pair(it, *pair) for pair in pairs
        ]


def requests_of(*arguments):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(arguments)]


def test_special_tokens_and_the_start(loaded):
    end, tokenizer = "<|endoftext|>", loaded.tokenizer
    model = LmEvalModel(loaded)
    plain = tokenizer.encode("the cat")
    assert model.prefix_token_id == model.eot_token_id == tokenizer.eos_id
    assert model.tok_encode("the cat") == plain
    assert model.tok_encode("the cat", add_special_tokens=True) == [tokenizer.bos_id, *plain]
    assert model.tok_encode(f"the cat{end}") == [*plain, tokenizer.eos_id]
    starts = dataclasses.replace(tokenizer, starts=True)
    model = LmEvalModel(dataclasses.replace(loaded, tokenizer=starts))
    assert model.tok_encode("the cat") == [tokenizer.bos_id, *plain]
    assert model.tok_encode(f"{end}the cat") == [tokenizer.bos_id, *plain]  # Not twice.
    assert model.tok_encode("the cat", add_special_tokens=False) == plain


def test_an_encoder_decoder_reads_the_context_as_its_source(monkeypatch):
    numbers = SimpleNamespace(
        encode=lambda text: [int(word) for word in text.split()],
        decode=lambda ids: " ".join(map(str, ids)),
        bos_id=None,
        eos_id=1,
        pad_id=0,
    )
    t5 = FAMILIES["t5"].build(**FAMILIES["t5"].tiny)
    backend, seen = LmEvalModel(Loaded(t5, {}, numbers)), []
    assert backend.backend == "seq2seq" and backend.max_length == 2048

    def capture(model, params, prompts, *, source, **options):
        seen.append((prompts, source, options["max_new_tokens"]))
        return [[8, 9, 1]]

    monkeypatch.setattr(harness, "generate_until", capture)
    assert backend.generate_until(requests_of(("5 6 7", {"max_gen_toks": 4}))) == ["8 9"]
    assert seen.pop() == (None, [[5, 6, 7, 1]], 4)
    monkeypatch.setattr(
        LmEvalModel, "_loglikelihood_tokens", lambda self, requests, **_: seen.extend(requests)
    )
    backend.loglikelihood(requests_of(("5 6 7", " 8 9"), ("", "8")), disable_tqdm=True)
    assert [ids for _, *ids in seen] == [[[5, 6, 7, 1], [8, 9]], [[1], [8]]]


@pytest.mark.slow
def test_replies_do_not_depend_on_the_batch(loaded):
    settings = {"until": [" sat"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    short = {"until": ["\n"], "max_gen_toks": 3}
    requests = requests_of(*[(f"the {word}", settings) for word in WORDS[:6]], ("a", short))
    requests += requests_of(("the cat", settings), ("the cat", settings))
    one, many = (LmEvalModel(loaded, batch_size=size).generate_until(requests) for size in (1, 8))
    assert one == many
    assert one[-1] != one[-2]  # Drawn twice, and not one draw repeated.
    assert LmEvalModel(loaded, seed=1).generate_until(requests) != one


def test_a_context_gives_way_to_the_reply(loaded):
    limit, model = loaded.model.max_length, LmEvalModel(loaded)
    long = " ".join(["the cat sat on"] * limit)
    assert model._prompt(long, 4) == loaded.tokenizer.encode(long)[-(limit - 4) :]
    with pytest.raises(ValueError, match=f"{limit} new tokens leave no room"):
        model.generate_until(requests_of(("the", {"max_gen_toks": limit})))
    with pytest.raises(ValueError, match="generation here has no num_beams"):
        model.generate_until(requests_of(("the", {"num_beams": 4})))


def test_chats(loaded):
    model = LmEvalModel(loaded)
    history = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "the "}]
    assert model.apply_chat_template(history[:1]) == "<user>cat?\n<assistant>"
    assert model.apply_chat_template(history, False) == "<user>cat?\n<assistant>the"
    assert model.chat_template(True) == CHAT
    assert model.tokenizer_name == "tiny__llama"
    plain = LmEvalModel(dataclasses.replace(loaded, tokenizer=teeny_gpt_tokenizer()))
    assert plain.chat_template(True) is None
    with pytest.raises(ValueError, match="no chat template"):
        plain.apply_chat_template(history)


def test_bad_input_is_named(loaded):
    with pytest.raises(ValueError, match="tiny/llama has no tokenizer"):
        LmEvalModel(dataclasses.replace(loaded, tokenizer=None))
    with pytest.raises(ValueError, match="batch_size is a number of rows, not 'auto'"):
        LmEvalModel(loaded, batch_size="auto")


def test_the_registry_knows_it(loaded):
    from lm_eval.api.registry import get_model

    made = get_model("lm").create_from_arg_obj({"loaded": loaded}, {"device": None})
    assert isinstance(made, LmEvalModel)


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "lm.eval.harness")
    with pytest.raises(ImportError, match=r"pip install 'lm\[eval\]'"):
        import lm.eval.harness  # noqa: F401
