"""From a pretrained checkpoint to a finetuned one: in full, by LoRA, the head alone; on replies."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

import lm
from lm.cli import main
from lm.core.config import from_json, to_json, with_defaults
from lm.core.overrides import apply_overrides
from lm.core.paths import flatten
from lm.interop.loaded import Loaded
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.families.teeny_gpt import teeny_gpt
from lm.opening import start
from lm.train.experiment import load_experiment
from lm.train.loop import train
from lm.train.metrics import read_metrics
from lm.train.run_dir import check_config, config_of, experiment_of
from lm.train.trainable import ADAPTER, FULL
from tests.data.chats import chat_tokenizer
from tests.data.test_instructions import write
from tests.train.toy import toy_experiment

PRETRAIN = """
from lm.data.corpus import TextData
from lm.data.instructions import InstructionData
from lm.models.adapters import LoRA
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.trainable import Group


def experiment():
    return Experiment(
        name="tiny",
        model=teeny_gpt({vocab_size}, 48, 16, num_heads=2, num_layers=2, mlp_multiplier=2),
        data={data},
        optimizer=AdamW(Constant(1e-2)),
        train=TrainConfig(steps=8, batch_size=8, eval_every=8, log_every=1),
        {more}
    )
"""
HEAD = 'trainable=(Group("head/*"), Group("*", trains=False)),'
ADAPTER_OF = 'adapter=LoRA(2, targets=("*/mixer/*",)),'
CHANGED = {
    "full": ".*",
    "lora": ".*lora_[ab]",
    "head": "head/.*",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two texts, an experiment on each, and one that finetunes only the head."""
    folder = tmp_path_factory.mktemp("finetune")
    for name, words in {"old": "police fire storm", "new": "storm mayor vote"}.items():
        lines = [f"{words} {i:b}".replace("0", "a").replace("1", "b") for i in range(300)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
        data = f'TextData("text:{folder}/{name}.txt", "teeny_gpt", length=32)'
        for kind, more in {"": "", "_lora": ADAPTER_OF, "_head": HEAD}.items():
            code = PRETRAIN.format(vocab_size=29, data=data, more=more)
            (folder / f"{name}{kind}.py").write_text(code)
    return folder


@pytest.mark.slow
@pytest.mark.ledger("D06")
def test_pretrain_save_reload_finetune_evaluate(folder, capsys):
    """One config system and one command for all; each finetuning begins at the restored loss."""
    base = folder / "base"
    assert main(["train", str(folder / "old.py"), "--run-dir", str(base)]) == 0
    loaded = lm.load(base)
    before = flatten(loaded.params)
    data = load_experiment(folder / "new.py").data.make()
    first = next(data.train(8, 0))
    expected = lm.evaluate(loaded.model, loaded.params, [first])["loss"]
    held_out = lm.evaluate(loaded.model, loaded.params, data.validation(8))["loss"]
    for kind, words in {
        "full": [str(folder / "new_lora.py"), "--trainable", "full"],
        "lora": [str(folder / "new_lora.py")],
        "head": [str(folder / "new_head.py")],
    }.items():
        words += ["--run-dir", str(folder / kind), "--init-from", str(base)]
        assert main(["train", *words]) == 0
        records = read_metrics(folder / kind / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(9))
        assert abs(records[0]["validation_loss"] - held_out) <= 1e-6
        assert abs(records[1]["loss"] - expected) <= 1e-6
        assert records[-1]["validation_loss"] < held_out
        after = flatten(lm.load(folder / kind).params)
        assert {p for p in after if p not in before} == {p for p in after if "lora_" in p}
        changed = {p for p in after if p not in before or (after[p] != before[p]).any()}
        trained = {p for p in after if re.fullmatch(CHANGED[kind], p)}
        # A key bias has no gradient but what rounding leaves of one.
        assert changed - {p for p in after if p.endswith("lora_scale")} >= trained - {
            p for p in trained if p.endswith("/k/bias")
        }
        assert kind == "full" or not changed & (before.keys() - trained)
        capsys.readouterr()
        assert main(["evaluate", str(folder / kind)]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert abs(metrics["loss"] - records[-1]["validation_loss"]) <= 1e-5


def test_full_by_name_is_without_adapter():
    """'full' and 'adapter' name tables; what they say is what the config holds."""
    plain = toy_experiment()
    adapted = replace(plain, adapter=LoRA(2))
    full = replace(adapted, trainable="full")
    assert full == plain and full.recipe().trainable == FULL and full.recipe().adapter is None
    assert replace(adapted, trainable="adapter") == adapted
    assert adapted.recipe().trainable == ADAPTER
    with pytest.raises(ValueError, match="has no adapter"):
        replace(plain, trainable="adapter")
    with pytest.raises(ValueError, match="trainable"):
        apply_overrides(adapted, ["--trainable", "half"])


def test_configs_from_before_a_field_are_the_same_run(folder):
    """Fields that a saved config lacks have their defaults; a start stood elsewhere once."""
    experiment = load_experiment(folder / "old.py")
    here = config_of(experiment, "data")
    there = json.loads(json.dumps(here))
    for name in ("adapter", "init_from"):
        del there["experiment"][name]
    del there["experiment"]["train"]["frozen_dtype"]
    del there["experiment"]["model"]["stack"]["entry"]["dropout"]
    there["experiment"]["trainable"] = to_json(FULL)
    check_config("there", {**there, "init_from": ""}, here)
    check_config("there", there, here)
    assert from_json(experiment_of(there)) == experiment
    started = config_of(replace(experiment, init_from="runs/a"), "data")
    check_config("there", {**there, "init_from": "runs/a"}, started)
    with pytest.raises(ValueError, match='init_from is "" there and "runs/a" here'):
        check_config("there", there, started)
    del there["experiment"]["train"]["steps"]  # It has no default.
    with pytest.raises(ValueError, match=r"train\.steps is"):
        check_config("there", there, here)
    odd = {"class": "elsewhere.Thing", "a": [to_json(LoRA())]}
    assert with_defaults(odd) == odd


def test_a_start_that_nobody_opened_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"starts from runs/old.*lm.opening.start"):
        train(replace(toy_experiment(), init_from="runs/old"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert start(toy_experiment()) == {}


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A model that has never learned to chat, with a tokenizer that can; and rows for it."""
    folder = tmp_path_factory.mktemp("talk")
    tokenizer = chat_tokenizer()
    model = teeny_gpt(
        tokenizer.vocab_size, 48, num_features=16, num_heads=2, num_layers=2, mlp_multiplier=2
    )
    loaded = Loaded(model, P.init(model, jax.random.key(0)), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.leaving.load_dequantized", lambda source, echo: loaded)
        lm.import_model("made here", folder / "base")
    rows = [{"prompt": f"Add {n} and 2.", "completion": "It is 4."} for n in range(200)]
    source = write(folder / "rows.jsonl", rows)
    data = f'InstructionData("{source}", length=40)'
    more = f'{ADAPTER_OF} init_from="{folder}/base",'
    code = PRETRAIN.format(vocab_size=tokenizer.vocab_size, data=data, more=more)
    (folder / "talk.py").write_text(code)
    return folder


@pytest.mark.slow
def test_instructions_through_the_template_of_the_start(talking, capsys):
    """The tokenizer comes with the start; an example is shown; only replies count; it goes on."""
    words = ["train", str(talking / "talk.py"), "--run-dir", str(talking / "run")]
    assert main([*words, "--train.steps", "30"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"<\|im_start\|>assistant\n\[It is 4\.<\|im_end\|>\]\n", shown)
    assert re.search(r"data +1\d\d conversations, 0 of them cut to 40 places", shown)
    assert "nats per token of the replies" in shown and "> Add" in shown
    assert (talking / "run/chat_template.jinja").exists()
    records = read_metrics(talking / "run/metrics.jsonl")
    assert records[-1]["validation_loss"] < records[0]["validation_loss"]
    # The first loss is that of the start on the replies, by hand.
    loaded = lm.load(talking / "base")
    experiment = load_experiment(talking / "talk.py")
    batch = next(experiment.data.make(loaded.tokenizer).train(8, 0))
    total = count = 0.0
    for row in range(8):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            logits = loaded.logits(batch.tokens[row][here])[0]
            nll = -np.asarray(jax.nn.log_softmax(logits))
            nll = nll[np.arange(here.sum()), batch.targets[row][here]]
            total += float((nll * batch.weights[row][here]).sum())
            count += float(batch.weights[row].sum() if segment == 1 else 0)
    assert abs(records[1]["loss"] - total / count) <= 1e-5
    # It goes on without its start.
    (talking / "base").rename(talking / "moved")
    assert main([*words, "--train.steps", "30"]) == 0
    capsys.readouterr()
    (talking / "moved").rename(talking / "base")
    assert main(["evaluate", str(talking / "run")]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert abs(loss - records[-1]["validation_loss"]) <= 1e-5


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data.length", "64"], "positions for 48"),
        (["--init-from", ""], "starts from none"),
        (["--init-from", "{folder}/none"], "there is no"),
        (["--data.source", "alpaca"], "no instruction set 'alpaca'"),
        (["--data.length", "3"], "no token of the train split trains"),
        (["--data.layout", "pack"], "layout"),
        (["--trainable", "none", "--adapter.targets", "'*/none',"], "no kernel fits"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(words, message, talking, capsys):
    words = [word.format(folder=talking) for word in words]
    never = talking / "never"
    assert main(["train", str(talking / "talk.py"), "--run-dir", str(never), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error, error
    assert not never.exists()


@pytest.mark.slow
def test_chat_and_generate_by_the_template(talking, capsys, monkeypatch):
    """`lm chat` remembers what was said; both read it as the template writes it."""
    base = str(talking / "base")
    tokenizer = lm.load(base).tokenizer
    prompts = []

    def generate_tokens(model, params, prompt, **options):
        prompts.append(tokenizer.decode(prompt, special=True))
        assert tokenizer.end_of_turn in options["stop_ids"]
        yield from [*tokenizer.encode("It is"), tokenizer.end_of_turn]

    monkeypatch.setattr("lm.infer.generate.stream_tokens", generate_tokens)
    said = iter(["hi", "a", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["chat", base]) == 0
    assert capsys.readouterr().out == "It is\nIt is\n"
    first = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    second = first + "It is<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [first, second]
    words = iter(["Add 2 and 2. " * 30, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(words))
    assert main(["chat", base]) == 2
    assert "fills the 48 places" in capsys.readouterr().err
    words = ["generate", base, "--prompt", "hi", "--temperature", "0", "--max-new-tokens", "5"]
    assert main([*words, "--chat"]) == 0
    ours = capsys.readouterr().out
    assert main([*words[:3], first, *words[4:]]) == 0
    assert ours != capsys.readouterr().out.removeprefix(first)  # There it is text.
