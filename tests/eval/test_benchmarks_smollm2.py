"""SmolLM2 on real benchmarks: our numbers are those of lm-evaluation-harness, item by item.

The numbers stand in docs/benchmarks.md; each task takes some minutes on two cores.
"""

import json
import time

import numpy as np
import pytest

import lm
from lm.eval.requests import TASKS, load_items
from lm.eval.tasks import score_items, summarize

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
LIMIT = 200


@pytest.fixture(scope="module")
def ours():
    return lm.load("package:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The harness's own backend for transformers, on the directory that `lm export` writes."""
    from lm_eval.models.huggingface import HFLM

    path = tmp_path_factory.mktemp("smollm2") / "out"
    lm.export_model("package:smollm2-135m-instruct", path)
    return HFLM(str(path), device="cpu", dtype="float32", batch_size=8)


def config_of(name, items, folder):
    """The items as a local task of the harness."""
    docs = [
        {
            "query": item.pairs[0][0],
            "target": item.pairs[item.gold][1],
            # The harness puts the space before each choice, and not before a target.
            "choices": [text.removeprefix(" ") for _, text in item.pairs],
            "gold": item.gold,
        }
        for item in items
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    word = TASKS[name].word
    kind = (
        {"output_type": "loglikelihood", "doc_to_target": "target"}
        if word
        else {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
    )
    return kind | {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "query",
        "metric_list": [
            {"metric": m} for m in (["perplexity", "acc"] if word else ["acc", "acc_norm"])
        ],
    }


@pytest.mark.parametrize("name", ["lambada", "arc_easy", "hellaswag"])
def test_item_by_item(name, ours, theirs, tmp_path):
    items = load_items(name, limit=LIMIT)
    scored = score_items(ours, items, batch_size=8)
    begin = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model=theirs,
        tasks=[config_of(name, items, tmp_path)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    seconds = time.perf_counter() - begin
    samples = sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(items) == LIMIT
    worst = 0.0
    for item, sample, likelihoods in zip(items, samples, scored.likelihoods):
        answers = [answer for (answer,) in sample["resps"]]
        arguments = [tuple(each) for each in sample["arguments"]]
        assert arguments == list(item.pairs)
        assert [ours.is_greedy for ours in likelihoods] == [greedy for _, greedy in answers]
        sums, theirs_sums = (
            np.array([each[0] for each in some]) for some in (likelihoods, answers)
        )
        worst = max(worst, np.abs(sums - theirs_sums).max())
        assert sums.argmax() == theirs_sums.argmax()
    metrics = summarize(items, scored.likelihoods, TASKS[name].word)
    results = found["results"][f"local_{name}"]
    print(f"\n{name}: {LIMIT} items, worst difference {worst:.1e} nats, {metrics}, {results}")
    print(f"ours {scored.seconds:.0f} s, {scored.tokens:,} tokens; theirs {seconds:.0f} s")
    assert worst <= 1e-3
    assert metrics["accuracy"] == pytest.approx(results["acc,none"], abs=1e-9)
    if TASKS[name].word:
        assert metrics["perplexity"] == pytest.approx(results["perplexity,none"], rel=1e-5)
    else:
        assert metrics["accuracy_norm"] == pytest.approx(results["acc_norm,none"], abs=1e-9)
