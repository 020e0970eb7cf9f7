"""Tokenizers: one protocol, characters, and what the `tokenizers` library trains or loads."""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lm.data.chat import GREETING, Messages, find_replies, overlaps, render_chat
from lm.data.text import fold
from lm.data.tokenizer_config import OTHERS, read_tokenizer_config

Unknown = Literal["raise", "drop", "unk"]
_FORMAT = "lm.char.v1"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer.

    `encode` adds no special tokens, and `decode` leaves them out.
    """

    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, path: str | Path) -> None: ...


@dataclass(frozen=True)
class CharTokenizer:
    """Characters to integers and back; a character's id is its place among the symbols.

    Attributes:
      symbols: the vocabulary; a symbol of several characters ('<pad>') stands for no text.
      pad: the symbol that fills rows, or None.
      bos: the symbol before a text, or None.
      eos: the symbol after a text, or None; it may be `pad`.
      unk: the symbol for a character outside the vocabulary, if `unknown` is 'unk'. It decodes to
        U+FFFD, the replacement character.
      unknown: what becomes of such a character: a ValueError ('raise'), nothing ('drop'), `unk`.
      folds: whether text is first put into lower case and loses its accents.
    """

    symbols: tuple[str, ...]
    pad: str | None = None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    unknown: Unknown = "raise"
    folds: bool = False
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        ids = {symbol: index for index, symbol in enumerate(self.symbols)}
        if len(ids) != len(self.symbols):
            raise ValueError("The symbols of a character tokenizer should differ, and some do not.")
        if self.unknown not in get_args(Unknown) or (self.unknown == "unk") != (
            self.unk is not None
        ):
            raise ValueError(
                f"unknown should be one of {get_args(Unknown)}, and 'unk' exactly when there is an "
                f"unk symbol: it is {self.unknown!r}, and unk is {self.unk!r}."
            )
        for special in filter(None, (self.pad, self.bos, self.eos, self.unk)):
            if special not in ids:
                raise ValueError(f"The special symbol {special!r} should be among the symbols.")
        object.__setattr__(self, "_ids", ids)

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @property
    def pad_id(self) -> int | None:
        return self._ids.get(self.pad or "")

    @property
    def bos_id(self) -> int | None:
        return self._ids.get(self.bos or "")

    @property
    def eos_id(self) -> int | None:
        return self._ids.get(self.eos or "")

    def encode(self, text: str) -> list[int]:
        """Returns one id a character.

        Raises:
          ValueError: a character outside the vocabulary, if `unknown` is 'raise'.
        """
        ids = [self._ids.get(c) for c in (fold(text) if self.folds else text)]
        if self.unknown == "drop":
            return [i for i in ids if i is not None]
        if self.unknown == "unk":
            unk_id = self._ids[self.unk or ""]
            return [unk_id if i is None else i for i in ids]
        if None in ids:
            raise ValueError(
                f"The character {text[ids.index(None)]!r} is not in the tokenizer's vocabulary: "
                f"train it on text that has it, or with unknown='unk'."
            )
        return [i for i in ids if i is not None]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def row(self, text: str, length: int = 150) -> list[int]:
        """Returns [bos] + characters + padding, cut or filled to `length`, as teenyGPT reads it."""
        assert self.bos_id is not None and self.pad_id is not None
        return ([self.bos_id, *self.encode(text)] + [self.pad_id] * length)[:length]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first end-of-text, without special symbols.

        An id that no symbol has, which a model with a larger vocabulary may draw, is U+FFFD, too.
        """
        unk_id, symbols = self._ids.get(self.unk or ""), []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            is_known = i != unk_id and 0 <= i < len(self.symbols)
            symbols.append(self.symbols[i] if is_known else "\N{REPLACEMENT CHARACTER}")
        return "".join(symbol for symbol in symbols if len(symbol) == 1)

    def save(self, path: str | Path) -> None:
        """Writes `path`/tokenizer.json."""
        fields = {name: getattr(self, name) for name in _CHAR_FIELDS}
        text = json.dumps({"format": _FORMAT, **fields}, ensure_ascii=False, indent=1)
        (Path(path) / "tokenizer.json").write_text(text, encoding="utf-8")


_CHAR_FIELDS = ("symbols", "pad", "bos", "eos", "unk", "unknown", "folds")


def char_tokenizer(alphabet: str, unknown: Unknown = "raise") -> CharTokenizer:
    """Returns <pad>, <bos>, <eos>, perhaps <unk>, and then the alphabet in its order."""
    unk = "<unk>" if unknown == "unk" else None
    specials = ("<pad>", "<bos>", "<eos>", *([unk] if unk else []))
    return CharTokenizer((*specials, *alphabet), "<pad>", "<bos>", "<eos>", unk, unknown)


def teeny_gpt_tokenizer() -> CharTokenizer:
    """Returns teenyGPT's 29 symbols: 0 pads and ends, a-z are 1..26, space is 27, 28 begins.

    Text is put into lower case and loses its accents (é becomes e, í becomes i); other characters
    are dropped.
    """
    symbols = ("<pad>", *"abcdefghijklmnopqrstuvwxyz ", "<cls>")
    return CharTokenizer(symbols, "<pad>", "<cls>", "<pad>", unknown="drop", folds=True)


@dataclass(frozen=True)
class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, with the special tokens of its configuration.

    Attributes:
      library: the Rust tokenizer.
      pad, bos, eos: special tokens, or None.
      starts: whether the model expects `bos` before every text that it reads.
      chat_template: in Jinja, how a conversation is written; or None.
      others: further special tokens, as pairs of what they are ('unk', 'cls', 'sep', 'mask') and
        how they are spelled, for other readers of the files.
    """

    library: tokenizers.Tokenizer
    pad: str | None = None
    bos: str | None = None
    eos: str | None = None
    starts: bool = True
    chat_template: str | None = None
    others: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        self.library.encode_special_tokens = True
        self.library.no_padding()
        self.library.no_truncation()
        for token in filter(None, (self.pad, self.bos, self.eos)):
            if self.library.token_to_id(token) is None:
                raise ValueError(
                    f"The special token {token!r} is not in the tokenizer's vocabulary."
                )

    @property
    def vocab_size(self) -> int:
        return self.library.get_vocab_size()

    @property
    def pad_id(self) -> int | None:
        return self.library.token_to_id(self.pad) if self.pad else None

    @property
    def bos_id(self) -> int | None:
        return self.library.token_to_id(self.bos) if self.bos else None

    @property
    def eos_id(self) -> int | None:
        return self.library.token_to_id(self.eos) if self.eos else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns the text's ids; with `special`, special tokens spelled out in it are themselves.

        Prompts written by a template want that; a corpus or a stranger's words must not.
        """
        library = self._parser if special else self.library
        return library.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.library.to_str())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Returns the text, without special tokens unless `special`."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=not special)

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """The special tokens and their ids."""
        added = self.library.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = False, **values: Any
    ) -> str:
        """Returns a conversation as the model reads it; encode it with `special=True`.

        Args:
          messages: dicts with 'role' and 'content'.
          add_generation_prompt: whether the text ends where a reply begins.
          values: more that the template reads, such as tools.

        Raises:
          ValueError: if there is no template, or it refuses the messages.
        """
        template, tokens = self._template()
        values = {**tokens, "add_generation_prompt": add_generation_prompt, **values}
        return render_chat(template, messages, **values)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Returns the ids of a conversation, up to where the next reply begins."""
        return self.encode(self.apply_chat_template(messages, True), special=True)

    def encode_replies(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Returns the ids of a conversation, and for each the number of the reply it belongs to.

        Replies count from 1, the rest is 0 (`lm.data.chat.find_replies`).

        Raises:
          ValueError: if there is no template, or it does not write the replies as they are.
        """
        template, tokens = self._template()
        text, spans = find_replies(template, messages, self.specials, **tokens)
        encoding = self._parser.encode(text, add_special_tokens=False)
        numbers = [
            next((n for n, span in enumerate(spans, 1) if overlaps(offsets, span)), 0)
            for offsets in encoding.offsets
        ]
        return encoding.ids, numbers

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The special token that ends a reply in the chat template, or None."""
        try:
            ids, numbers = self.encode_replies(GREETING)
        except ValueError:  # No reply to learn it from; the end of the text stops it then.
            return None
        last = [token for token, number in zip(ids, numbers) if number][-1]
        return last if last in self.specials.values() else None

    def _template(self) -> tuple[str, dict[str, str]]:
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: write the prompt yourself")
        tokens = {"pad_token": self.pad, "bos_token": self.bos, "eos_token": self.eos}
        return self.chat_template, {name: token for name, token in tokens.items() if token}

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, its config and chat template, as Hugging Face reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        known = self.library.token_to_id
        tokens = {n: t for n, t in self.others if known(t) is not None}
        tokens |= {"pad": self.pad, "bos": self.bos, "eos": self.eos}
        config |= {f"{name}_token": token for name, token in tokens.items() if token}
        if not self.starts:
            config["add_bos_token"] = False
        if self.chat_template is not None:
            (Path(path) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        self.library.save(str(Path(path) / "tokenizer.json"))
        (Path(path) / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def train_chars(texts: Iterable[str], unknown: Unknown = "raise") -> CharTokenizer:
    """Returns a tokenizer of the texts' characters, in the order of their code points."""
    return char_tokenizer("".join(sorted(set().union(*texts))), unknown)


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Returns a byte-level byte-pair encoding trained on texts, as GPT-2's.

    The text is split by GPT-2's pattern into words with their leading space, numbers, punctuation
    and white space; the most frequent pair within a piece is merged until the vocabulary is full.
    Any text is encoded, and decodes to itself. '<|endoftext|>' begins, ends and pads.

    Args:
      texts: the corpus.
      vocab_size: 257 or more: the bytes, the special token, and the merges.

    Raises:
      ValueError: a smaller vocabulary.
    """
    if vocab_size < 257:
        raise ValueError(f"A byte-level vocabulary has at least 257 tokens, not {vocab_size}.")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[end],
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return SubwordTokenizer(library, pad=end, bos=end, eos=end)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Returns a WordPiece tokenizer trained on texts, as BERT's (uncased).

    [CLS] begins, [SEP] ends, [PAD] pads; [MASK] and [UNK] are there too. A word with a character
    that the corpus lacks becomes [UNK]; case, accents and white space are not kept.
    """
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    others = tuple((name, f"[{name.upper()}]") for name in OTHERS)
    return SubwordTokenizer(library, pad="[PAD]", bos="[CLS]", eos="[SEP]", others=others)


def load_tokenizer(path: str | Path) -> CharTokenizer | SubwordTokenizer:
    """Returns the tokenizer of a run or of a Hugging Face directory.

    Args:
      path: a directory with a tokenizer.json, or that file. The special tokens of a library
        tokenizer are read from the tokenizer_config.json beside it.

    Raises:
      ValueError: there is no such file, or it is no tokenizer.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            f"There is no tokenizer at {path}: name a tokenizer.json or its directory."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") == _FORMAT:
            fields = {name: content[name] for name in _CHAR_FIELDS}
            return CharTokenizer(**{**fields, "symbols": tuple(fields["symbols"])})
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare exceptions.
        raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error
    return SubwordTokenizer(library, **read_tokenizer_config(path.parent))
