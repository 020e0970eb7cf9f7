"""One build of the headlines, in the user's own cache, shared by every test and worker."""

import pytest

from lm.data.cache import cache_dir
from lm.data.example import tokenize
from lm.data.source import load_source
from lm.data.tokenizer import teeny_gpt_tokenizer


@pytest.fixture(scope="session")
def headlines():
    """{split: source} of the cleaned headlines."""
    return {split: load_source("headlines", split) for split in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def original():
    """{split: source} of the headlines as the original teenyGPT reads them."""
    names = ("train", "validation", "test")
    return {split: load_source("headlines/original", split) for split in names}


@pytest.fixture(scope="session")
def wheels(headlines, original):
    """The folder where pip has put the pinned packages."""
    return cache_dir() / "packages"


@pytest.fixture(scope="session")
def validation(original):
    """The tokenized validation split: 3,121 documents of 29 symbols."""
    return tokenize(original["validation"], teeny_gpt_tokenizer())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
