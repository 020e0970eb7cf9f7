"""The command line: every command works on a tiny run, and bad input gets one sentence."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import lm
from lm.cli import main
from tests.eval import toy_package

EXPERIMENT = """
from lm.data.corpus import TextData
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment():
    return Experiment(
        name="tiny",
        model=teeny_gpt(
            max_length=48, num_features=16, num_heads=2, num_layers=2, mlp_multiplier=2
        ),
        data=TextData("text:{text}", "teeny_gpt", length=32),
        optimizer=AdamW(Cosine(1e-2)),
        train=TrainConfig(steps=6, batch_size=8, eval_every=3, log_every=1),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    words = np.array(
        ["police", "fire", "mayor", "city", "vote", "storm", "game", "win", "loss", "bank"]
    )
    lines = [
        " ".join(rng.choice(words, 6)) + f" {i:b}".replace("0", "a").replace("1", "b")
        for i in range(300)
    ]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "tiny.py").write_text(EXPERIMENT.format(text=folder / "text.txt"))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A finished run, made by the command itself."""
    assert main(["train", str(folder / "tiny.py"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_train_leaves_what_it_promises(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"]
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"):
        assert np.isfinite(records[-1][name]), name
    for name in ("config.json", "tokenizer.json", "curves.png", "samples.txt", "checkpoints"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").iterdir())
    bits = json.loads((run / "bits_per_character.json").read_text())
    assert bits.keys() == {"this model", "bigram", "5-gram"}
    assert (run / "samples.txt").read_text().count("temperature") == 2


def test_train_again_has_nothing_left_to_do(run, folder, capsys):
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", str(folder / "tiny.py"), "--run-dir", str(run)]) == 0
    assert (run / "metrics.jsonl").read_text() == before
    assert "next: lm generate" in capsys.readouterr().out


def test_generate_and_evaluate(run, capsys):
    words = ["--prompt", "police ", "--max-new-tokens", "8", "--temperature", "0"]
    assert main(["generate", str(run), *words]) == 0
    first = capsys.readouterr().out
    assert first.startswith("police ")
    assert main(["generate", str(run), *words]) == 0
    assert capsys.readouterr().out == first
    assert main(["evaluate", str(run), "--split", "validation"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(r["validation_loss"] for r in records if "validation_loss" in r)
    assert abs(metrics["loss"] - best) < 1e-5
    bits = json.loads((run / "bits_per_character.json").read_text())["this model"]
    assert abs(metrics["bits_per_character"] - bits) < 1e-4


def test_generate_from_a_file_of_prompts(run, tmp_path, capsys):
    """A JSON object for each; what a killed process left is gone on with, to the same texts."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts = ["police ", "a", "the man ", "new study "]
    file.write_text("\n".join(prompts) + "\n\n")
    words = ["generate", str(run), "--prompts", str(file), "--max-new-tokens", "6", "--slots", "2"]
    assert main(words) == 2 and "needs --out" in capsys.readouterr().err
    words += ["--out", str(out), "--cache-dtype", "int8"]
    assert main(words) == 0
    assert re.search(r"4 texts, \d+ tokens in .* tokens/s", capsys.readouterr().err)
    lines = out.read_text().splitlines(keepends=True)
    records = {record["index"]: record for record in map(json.loads, lines)}
    assert [records[index]["prompt"] for index in range(4)] == prompts
    assert main(words) == 2 and "exists: go on" in capsys.readouterr().err
    out.write_text("".join(lines[:2]) + lines[2][:10])
    assert main([*words, "--resume"]) == 0
    again = {record["index"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert {i: r["text"] for i, r in again.items()} == {i: r["text"] for i, r in records.items()}
    file.write_text("another\n")
    assert main([*words, "--resume"]) == 2 and "other prompts" in capsys.readouterr().err


def test_evaluate_on_benchmarks(run, tmp_path, monkeypatch, capsys):
    toy_package.install(tmp_path / "cache", monkeypatch)
    words = ["--tasks", "lambada,hellaswag", "--limit", "2", "--batch-size", "4"]
    assert main(["evaluate", str(run), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["task", "lambada", "hellaswag"]
    found = json.loads((run / "evaluation.json").read_text())
    assert found["model"] == str(run) and found["tasks"].keys() == {"lambada", "hellaswag"}
    assert found["tasks"]["hellaswag"]["items"] == 2
    assert 0 <= found["tasks"]["hellaswag"]["accuracy"] <= 1
    for name in ("perplexity", "bits_per_byte", "tokens_per_second"):
        assert found["tasks"]["lambada"][name] > 0


def test_load_in_a_notebook(run):
    loaded = lm.load(run)
    logits = loaded.logits([loaded.tokenizer.encode("police")])
    assert logits.shape == (1, 6, 29)
    half = lm.load(run, dtype="bfloat16")
    assert jax.tree.leaves(half.params)[0].dtype == "bfloat16"
    assert np.abs(half.logits([[1, 2, 3]]) - loaded.logits([[1, 2, 3]])).max() < 0.5
    texts = lm.generate(loaded, ["police "], max_new_tokens=4, temperature=0.5)
    assert len(texts) == 1 and isinstance(texts[0], str)
    assert lm.score(loaded, ["police fire"])[0].sum < 0
    assert lm.embed(loaded, ["police", "fire"]).shape == (2, 16)


def test_load_on_a_mesh(run):
    from lm.core.mesh import MeshShape, make_mesh

    mesh = make_mesh(MeshShape(data=2, fsdp=4))
    spread, alone = lm.load(run, mesh=mesh), lm.load(run)
    kernel = spread.params["stack"]["pattern"]["blocks_0"]["mlp"]["layer"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4, 32)
    np.testing.assert_allclose(spread.logits([[1, 2, 3]]), alone.logits([[1, 2, 3]]), atol=1e-5)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--version"], f"lm {lm.__version__}"),
        (["--help"], "usage: lm COMMAND"),
        (["train", "--help"], "--run-dir"),
        (["list"], "1,089,181"),
        (["list", "gpt2"], "LearnedPositions(length=1024)"),
        (["data", "inspect", "text:{text}", "--length", "32"], "documents"),
    ],
)
def test_prints(words, expected, folder, capsys):
    assert main([word.format(text=folder / "text.txt") for word in words]) == 0
    assert expected in capsys.readouterr().out


def test_tokenizer_train(folder, capsys):
    out = folder / "bpe"
    words = ["tokenizer", "train", f"text:{folder / 'text.txt'}", "--out", str(out)]
    assert main([*words, "--vocab-size", "280"]) == 0
    assert "280 tokens" in capsys.readouterr().err and (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian"], "did you mean 'lm train'"),
        (["train", "{folder}/tinny.py"], "did you mean .*tiny.py"),
        (["train", "{folder}/tiny.py", "--train.step", "3"], "did you mean 'steps'"),
        (["train", "{folder}/tiny.py", "--run-dir"], "--run-dir needs a value"),
        (["train", "{folder}/tiny.py", "--profile", "all"], "--profile takes a number of steps"),
        (["train", "{folder}/tiny.py", "--data.source", "text:{folder}/none"], "none"),
        (["train", "{folder}/tiny.py", "--train.batch-size", "24", "--train.micro-batches", "4"],
         "does not divide"),
        (["train", "{folder}/tiny.py", "--data.length", "64"], "positions for 48"),
        (["train", "{folder}/tiny.py", "--run-dir", "{run}", "--train.seed", "5"],
         "train.seed is 0 there and 5 here"),
        (["generate", "{folder}/nothing", "--prompt", "a"], "there is no"),
        (["generate", "{folder}", "--prompt", "a"], "neither a run"),
        (["evaluate", "{run}", "--split", "holdout"], "holdout"),
        (["evaluate", "{run}", "--tasks", "lambda"], "did you mean 'lambada'"),
        (["evaluate", "{run}", "--tasks", "piqa", "--limit", "0"], "a limit of 0"),
        (["evaluate", "{run}", "--tasks", "piqa", "--data", "headlines"], "exclude each other"),
        (["list", "gpt9"], "no family 'gpt9'; there are"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_changes_nothing(words, message, folder, run, capsys):
    words = [word.format(folder=folder, run=run) for word in words]
    if words[0] == "train" and "--run-dir" not in words:
        words += ["--run-dir", str(folder / "never")]
    assert main(words) == 2
    error = capsys.readouterr().err

    assert re.search(message, error) and "Traceback" not in error, error
    assert not (folder / "never").exists()


def test_foreign_checkpoints_are_refused(run, folder, capsys):
    copy = folder / "foreign"
    shutil.copytree(run, copy)
    for step in (copy / "checkpoints").iterdir():
        for file in step.rglob("*"):
            if file.is_file():
                file.write_bytes(b"not a checkpoint")
    assert main(["generate", str(copy), "--prompt", "a"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    (copy / "config.json").write_text("{}")
    assert main(["generate", str(copy), "--prompt", "a"]) == 2
    assert "is not the config of a run" in capsys.readouterr().err
