"""Tokenizers of older directories, which have lists of tokens and merges and no tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from lm.data.tokenizer import SubwordTokenizer, load_tokenizer
from lm.data.tokenizer_config import read_tokenizer_config

WORDPIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
BYTE_PAIRS = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer")


def load_directory_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a Hugging Face directory, or None where it has no file that we read.

    Args:
      path: a directory with tokenizer.json; or vocab.txt (WordPiece, as BERT's); or vocab.json and
        merges.txt (byte-level BPE, as GPT-2's).

    Raises:
      ValueError: if a file cannot be read, or is of another class of tokenizers.
    """
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(path)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if (path / "vocab.txt").is_file():
        check_class(path, config, WORDPIECE)
        library, fields = wordpiece(path / "vocab.txt", config)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        check_class(path, config, BYTE_PAIRS)
        library, fields = byte_pairs(path / "vocab.json", path / "merges.txt", config)
    else:
        return None
    beside = read_tokenizer_config(path)
    others = dict(fields.get("others", ())) | dict(beside.get("others", ()))
    fields |= {**beside, "others": tuple(others.items())}
    named = [value for key, value in config.items() if key.endswith("_token")]
    named += [fields[name] for name in ("pad", "bos", "eos") if name in fields]
    texts = [token["content"] if isinstance(token, dict) else token for token in named]
    special = {text for text in texts if isinstance(text, str)}
    vocabulary = library.get_vocab()
    # In a set their order would be another in each process, and so would new ids.
    library.add_special_tokens(sorted(special & vocabulary.keys()))
    add_tokens(path, library, config, special)
    return SubwordTokenizer(library, **fields)


def check_class(path: Path, config: dict[str, Any], known: tuple[str, ...]) -> None:
    name = config.get("tokenizer_class", known[0]).removesuffix("Fast")
    if name not in (*known, "PreTrainedTokenizer"):
        raise ValueError(
            f"{path} has a {name} and no tokenizer.json: save it with a tokenizer.json, since only "
            f"{', '.join(known)} are read without"
        )


def wordpiece(file: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict]:
    """Returns BERT's tokenizer with a vocabulary of one token a line, and its special tokens."""
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {token: index for index, token in enumerate(lines)}
    unknown = str(config.get("unk_token", "[UNK]"))
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    library.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    usual = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.add_special_tokens([token for token in usual if token in vocabulary])
    fields = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]"}
    fields = {name: token for name, token in fields.items() if token in vocabulary}
    others = [(token[1:-1].lower(), token) for token in usual[1:] if token in vocabulary]
    return library, {**fields, "others": tuple(others)}


def byte_pairs(
    vocab: Path, merges: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict]:
    """Returns GPT-2's tokenizer with a vocabulary and merges, and its special tokens."""
    try:
        bpe = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # The library raises bare exceptions.
        raise ValueError(f"{vocab} and {merges} are no byte-level BPE: {error}") from error
    library = tokenizers.Tokenizer(bpe)
    prefix = config.get("add_prefix_space", False)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return library, {"bos": end, "eos": end} if library.token_to_id(end) is not None else {}


def add_tokens(
    path: Path, library: tokenizers.Tokenizer, config: dict[str, Any], special: set[str]
) -> None:
    """Adds the tokens beyond the vocabulary that the directory lists.

    Raises:
      ValueError: if one would get another id than is written there.
    """
    file = path / "added_tokens.json"
    listed = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tokens = {i: AddedToken(text, special=text in special) for text, i in listed.items()}
    for index, fields in config.get("added_tokens_decoder", {}).items():
        tokens[int(index)] = AddedToken(**fields)
    for index, token in sorted(tokens.items()):
        library.add_tokens([token])
        if library.token_to_id(token.content) != index:
            raise ValueError(
                f"{path}: the added token {token.content!r} cannot have the id {index}"
            )
