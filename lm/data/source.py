"""Random access to raw text by name: `load_source('headlines', 'train')[0].text`."""

import contextlib
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lm.data import files
from lm.data.cache import build_once, cache_dir
from lm.data.files import Text, Unit
from lm.data.headlines import Headlines

_CHUNK = 1000  # Array records are read much faster by the thousand than one by one.


@dataclass(frozen=True)
class Source(Sequence[Text]):
    """The raw texts of one split, on disk.

    Attributes:
      name: what `load_source` was asked for.
      split: the split.
      records: the TFDS data source behind it.
      field: the feature that is the text.
      source_field: the feature that an encoder reads, or None.
      fingerprint: a string that changes whenever the texts do.
    """

    name: str
    split: str
    records: Any
    field: str
    source_field: str | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Text:
        return self._text(self.records[range(len(self))[index]])

    def __iter__(self) -> Iterator[Text]:
        for start in range(0, len(self), _CHUNK):
            indices = list(range(start, min(start + _CHUNK, len(self))))
            yield from map(self._text, self.records.__getitems__(indices))

    def _text(self, record: dict[str, bytes]) -> Text:
        source = record[self.source_field].decode() if self.source_field else None
        return Text(record[self.field].decode(), source)


def load_source(
    spec: str, split: str, *, unit: Unit = "line", field: str = "", source_field: str = ""
) -> Source:
    """Returns the texts of a split, prepared on first use.

    Args:
      spec: 'headlines' or 'headlines/original', see `lm.data.headlines`; 'text:PATH' for a file, a
        directory or a glob of .txt and .jsonl files, see `lm.data.files`; or 'tfds:NAME' for any
        data set of tensorflow-datasets, which needs a network the first time.
      split: 'train', 'validation', 'test', or what else the data set has.
      unit: whether a document is a 'line' of a .txt file or a whole 'file'.
      field: the JSON field or TFDS feature that is the text; '' for 'text', or for the only
        feature that is a text.
      source_field: the one that an encoder reads; '' for none.

    Raises:
      ValueError: an unknown name, split or field, no such file, or a data set that cannot be had.
    """
    kind, _, rest = spec.partition(":")
    if kind == "text" and rest:
        config = files.make_config(rest, unit, field or "text", source_field)
        builder = files.Files(config=config, **_options())
        field, source_field = "text", "source" if source_field else ""
    elif kind == "tfds" and rest:
        builder = _named_builder(rest)
    elif spec in ("headlines", *(f"headlines/{name}" for name in Headlines.builder_configs)):
        builder = Headlines(config=spec.partition("/")[2] or "plain", **_options())
    else:
        raise ValueError(
            f"Unknown data {spec!r}: "
            "expected headlines, headlines/original, text:PATH or tfds:NAME."
        )
    build_once(Path(builder.data_dir), lambda: _download(builder))
    if not builder.info.splits:
        # Another process made it after this builder had looked for it.
        builder.info.read_from_directory(builder.data_dir)
    features: Any = builder.info.features
    splits = {name: info.num_examples for name, info in builder.info.splits.items()}
    if not splits.get(split):
        raise ValueError(f"{spec} has no examples in a split {split!r}, only in {sorted(splits)}.")
    field = field or _only_text(spec, features)
    unknown = {field, source_field} - {"", *features}
    if unknown:
        raise ValueError(
            f"{spec} has the fields {sorted(features)} and not {sorted(unknown)}: "
            "name one of those it has."
        )
    size = int(builder.info.splits[split].num_bytes)
    fingerprint = f"{builder.info.full_name}:{split}:{splits[split]}:{size}:{field}:{source_field}"
    records = builder.as_data_source(split)
    return Source(spec, split, records, field, source_field or None, fingerprint)


def _options() -> dict[str, Any]:
    return {"data_dir": cache_dir() / "tfds", "file_format": "array_record"}


def _named_builder(name: str) -> Any:
    try:
        return tfds.builder(name, **_options())
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, names, 3) or names[:3]
        raise ValueError(
            f"tensorflow-datasets knows no {name!r}: it has {', '.join(near)}, for example."
        ) from error
    except ImportError as error:
        raise ValueError(_needs_more(name, error)) from error


def _needs_more(name: str, error: ImportError) -> str:
    return f"tfds:{name} needs a package that is not here ({error}): pip install 'lm[tfds]'."


def _download(builder: Any) -> None:
    name = builder.info.full_name
    try:
        # TFDS prints bars of its own for every shard; a failure is told by its exception.
        quiet = io.StringIO()
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(_needs_more(name, error)) from error
    except OSError as error:
        raise ValueError(
            f"{name} could not be downloaded or written to {cache_dir() / 'tfds'} ({error}): "
            f"connect to the network or make space, or copy it there from elsewhere."
        ) from error


def _only_text(spec: str, features: Any) -> str:
    texts = sorted(name for name in features if isinstance(features[name], tfds.features.Text))
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise ValueError(f"{spec} has the text fields {texts}: say which to read by field=.")
    return texts[0]
