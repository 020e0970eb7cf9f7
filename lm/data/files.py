"""A TFDS builder for anybody's text: a file, a directory or a glob of .txt and .jsonl files."""

import dataclasses
import glob
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import tensorflow_datasets as tfds

from lm.data.text import SPLITS, split_of

# TFDS warns of every configuration that is not on its builder's list; these never are.
logging.getLogger("absl").addFilter(lambda record: "custom data config" not in record.getMessage())

Unit = Literal["line", "file"]


class Text(NamedTuple):
    """A raw example: a text and, for an encoder-decoder, the text that the encoder reads."""

    text: str
    source: str | None = None


@dataclasses.dataclass
class FilesConfig(tfds.core.BuilderConfig):
    """What to read and how.

    Attributes:
      paths: the files, absolute, in order.
      unit: whether a document is a 'line' of a .txt file or the whole 'file'; a .jsonl file always
        holds one document a line.
      field: the field of a JSON object that is its text.
      source_field: the field that an encoder reads, or ''.
    """

    paths: tuple[str, ...] = ()
    unit: Unit = "line"
    field: str = "text"
    source_field: str = ""


def find_files(path: str) -> tuple[str, ...]:
    """Returns the files of a path: itself, the .txt and .jsonl of a directory, or those of a glob.

    Raises:
      ValueError: there are none.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.suffix in (".txt", ".jsonl")]
    else:
        found = [Path(p) for p in glob.glob(str(root), recursive=True)]
    files = tuple(sorted(str(p.resolve()) for p in found if p.is_file()))
    if not files:
        raise ValueError(
            f"Expected a file, a glob, or a directory with .txt or .jsonl files, and found no file "
            f"at {path!r}: check the path."
        )
    return files


def make_config(
    path: str, unit: Unit = "line", field: str = "text", source_field: str = ""
) -> FilesConfig:
    """Returns the configuration for a path, named by the files' paths, sizes and times.

    A changed file is thus another data set, prepared anew.
    """
    paths = find_files(path)
    if source_field and not all(p.endswith(".jsonl") for p in paths):
        raise ValueError(f"A source field is one of .jsonl files, and {path!r} has other files.")
    stats = [(p, Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in paths]
    name = hashlib.sha256(repr((stats, unit, field, source_field)).encode()).hexdigest()[:16]
    return FilesConfig(
        name=name, description=path, paths=paths, unit=unit, field=field, source_field=source_field
    )


def named_split(path: str) -> str | None:
    """Returns the split that a file's name or nearest directories name, such as 'train'."""
    parts = (Path(path).stem, *reversed(Path(path).parts[:-1]))
    return next((part for part in parts[:2] if part in SPLITS), None)


def named_splits(paths: Sequence[str]) -> dict[str, str | None]:
    """Returns path -> the split that it names; ValueError if some name one and others do not."""
    splits = {path: named_split(path) for path in paths}
    without = [path for path, split in splits.items() if split is None]
    if without and len(without) < len(splits):
        raise ValueError(
            f"Some files are named after a split ({', '.join(SPLITS)}) and {without[0]} is not: "
            f"name all of them or none."
        )
    return splits


def documents(config: FilesConfig) -> Iterator[tuple[str, Text]]:
    """Yields (split, text) for every document that is not blank.

    Files called train, validation or test (`train.txt`, or `train/a.txt`) are those splits. Where
    no file is called so, a hash of the text decides, see `split_of`.

    Raises:
      ValueError: some files name a split and others do not, or a file cannot be read.
    """
    for path, split in named_splits(config.paths).items():
        for document in _read(path, config):
            if document.text.strip():
                yield split or split_of(document.text), document


def _read(path: str, config: FilesConfig) -> Iterator[Text]:
    try:
        if path.endswith(".jsonl"):
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parse(line, f"{path}:{number}", config)
        elif config.unit == "file":
            yield Text(Path(path).read_text(encoding="utf-8"))
        else:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    yield Text(line.rstrip("\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it first.") from error


def _parse(line: str, where: str, config: FilesConfig) -> Text:
    fields = [config.field, *filter(None, [config.source_field])]
    try:
        record = json.loads(line)
        values = [record[field] for field in fields]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{where} should be a JSON object with the fields {fields} ({error!r}): correct the "
            f"line, or name another field."
        ) from error
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: the fields {fields} should be strings, and one is not.")
    return Text(*values)


class Files(tfds.core.GeneratorBasedBuilder):
    """Text files as a TFDS data set; open it by `lm.data.source.load_source('text:PATH')`."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: FilesConfig

    def _info(self):
        names = ["text", *(["source"] if self.builder_config.source_field else [])]
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
        return self.dataset_info_from_configs(features=features, description="Text files.")

    def _split_generators(self, dl_manager):
        del dl_manager  # The files are here already.
        # TFDS refuses a split without examples, so they are counted first.
        counts = Counter(split for split, _ in documents(self.builder_config))
        return {split: self._generate_examples(split) for split in SPLITS if counts[split]}

    def _generate_examples(self, split):
        for index, (where, text) in enumerate(documents(self.builder_config)):
            if where == split:
                yield index, {name: v for name, v in text._asdict().items() if v is not None}
