import json

import pytest
import tensorflow_datasets as tfds

from lm.data.files import Text
from lm.data.source import load_source
from lm.data.text import key, split_of


class ToyNews(tfds.core.GeneratorBasedBuilder):
    """Stands for any data set of TFDS."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=2)
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"title": text, "summary": text, "label": label})
        return self.dataset_info_from_configs(features=features, description="Toy.")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for n in range(count):
            yield n, {"title": f"title {n}", "summary": f"summary {n}", "label": n % 2}


class NeedsTensorFlow(ToyNews):
    """Stands for a data set that TFDS cannot prepare without TensorFlow."""

    def _split_generators(self, dl_manager):
        raise ImportError("No module named 'tensorflow'")


class OutOfReach(ToyNews):
    """Stands for a data set behind a network that is not there."""

    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to host")


def texts(source):
    return sorted(text.text for text in source)


@pytest.fixture
def folder(tmp_path, cache):
    folder = tmp_path / "text"
    folder.mkdir()
    return folder


def test_lines_of_a_directory_are_split_by_hash(folder):
    lines = [f"line {n}" for n in range(300)]
    (folder / "a.txt").write_text("\n".join(lines[:200]) + "\n\n   \n")
    (folder / "sub").mkdir()
    records = [json.dumps({"text": line}) for line in lines[200:]]
    (folder / "sub" / "b.jsonl").write_text("\n".join(records))
    (folder / "ignored.csv").write_text("no")
    sources = {s: load_source(f"text:{folder}", s) for s in ("train", "validation", "test")}
    assert sorted(text for source in sources.values() for text in texts(source)) == sorted(lines)
    for split, source in sources.items():
        assert {split_of(text.text) for text in source} == {split}
    train = sources["train"]
    assert [train[n] for n in range(len(train))] == list(train) and train[-1] == list(train)[-1]


def test_copies_of_a_text_never_fall_into_two_splits():
    assert split_of("The Queen's  speech") == split_of("the queen s speech")
    assert key("A—b, c!") == "a b c"


def test_named_splits_files_and_globs(folder):
    (folder / "train.txt").write_text("one\ntwo")
    (folder / "test").mkdir()
    (folder / "test" / "x.txt").write_text("three\nfour")
    assert texts(load_source(f"text:{folder}", "train")) == ["one", "two"]
    assert texts(load_source(f"text:{folder}", "test", unit="file")) == ["three\nfour"]
    assert texts(load_source(f"text:{folder}/*.txt", "train")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"no examples in a split 'validation', only in \['test'"):
        load_source(f"text:{folder}", "validation")
    (folder / "stray.txt").write_text("five")
    with pytest.raises(ValueError, match=r"stray\.txt is not"):
        load_source(f"text:{folder}", "train")


def test_pairs_for_an_encoder_decoder(folder):
    (folder / "train.jsonl").write_text(json.dumps({"en": "cat", "de": "Katze"}))
    spec = f"text:{folder}/train.jsonl"
    assert list(load_source(spec, "train", field="de", source_field="en")) == [Text("Katze", "cat")]
    (folder / "train.txt").write_text("cat")
    with pytest.raises(ValueError, match="other files"):
        load_source(f"text:{folder}", "train", source_field="en")


def test_a_changed_file_is_read_anew(folder):
    path = folder / "train.txt"
    path.write_text("before")
    first = load_source(f"text:{path}", "train")
    path.write_text("after!")
    second = load_source(f"text:{path}", "train")
    assert texts(first) == ["before"] and texts(second) == ["after!"]
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"text": "a"}\n{"body": "b"}', r"train\.jsonl:2 .*fields \['text'\]"),
        ("train.jsonl", b"{", r"train\.jsonl:1"),
        ("train.jsonl", b'{"text": 3}', "should be strings"),
        ("train.txt", b"caf\xe9", "not UTF-8"),
        ("train.txt", b"\n  \n", "no examples"),
    ],
)
def test_bad_files(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_source(f"text:{folder}", "train")


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("text:/no/such/path", "train", "found no file at '/no/such/path'"),
        ("text:", "train", "Unknown data"),
        ("headline", "train", "Unknown data 'headline'"),
        ("headlines/new", "train", "Unknown data"),
        ("tfds:toy_new", "train", "knows no 'toy_new': it has toy_news"),
        ("tfds:toy_news", "train", r"text fields \['summary', 'title'\]"),
        ("tfds:toy_news", "dev", r"only in \['test', 'train'\]"),
        ("tfds:needs_tensor_flow", "train", r"pip install 'lm\[tfds\]'"),
        ("tfds:out_of_reach", "train", "no route to host.*connect to the network"),
    ],
)
def test_bad_specs(cache, spec, split, message):
    with pytest.raises(ValueError, match=message):
        load_source(spec, split)


def test_any_tfds_name(cache):
    source = load_source("tfds:toy_news", "train", field="title", source_field="summary")
    assert sorted(source) == [Text(f"title {n}", f"summary {n}") for n in range(5)]
    with pytest.raises(ValueError, match=r"not \['headline'\]"):
        load_source("tfds:toy_news", "test", field="headline")
