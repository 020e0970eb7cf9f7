"""GGUF files, in: llama.cpp's format of one file with metadata, quantized tensors and tokenizer.

Tensors are dequantized to fp32. Reading is closed, as everywhere: what nobody maps is an error.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from lm.data.tokenizer import SubwordTokenizer
from lm.interop.loaded import Loaded
from lm.models import params as P
from lm.models.family import Family
from lm.models.foreign import Linear, Weight, read_weights
from lm.models.zoo import get_family


def load_file(path: str | Path) -> Loaded:
    """Opens a GGUF file as our model, parameters (fp32, numpy) and tokenizer.

    Raises:
      ValueError: for an architecture, metadata key, tensor, quantization or tokenizer that is not
        implemented; for a tensor that is missing; for a file that is truncated or damaged.
    """
    path = Path(path)
    reader = open_reader(path)
    metadata = Metadata({name: field.contents() for name, field in reader.fields.items()}, path)
    family, config = read_config(metadata)
    tensors = Tensors(reader, path)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    tokenizer = read_tokenizer(metadata)
    config.setdefault("vocab_size", len(metadata.values["tokenizer.ggml.tokens"]))
    metadata.finish()
    model = family.read_config(config)
    table = [rename(row) for row in family.weights(model)]
    params = read_weights(table, tensors, P.abstract(model))
    return Loaded(model, jax.tree.map(np.asarray, params), tokenizer, name=str(path))


def open_reader(path: Path) -> gguf.GGUFReader:
    """Returns a reader of a file; ValueError if there is no whole GGUF file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} is no whole GGUF file, it may be truncated: fetch it again ({error})"
        ) from error


@dataclasses.dataclass
class Metadata:
    """The metadata of a file, read key by key; `finish` refuses what nobody asked for.

    Attributes:
      values: key -> value.
      path: of the file.
      read: the keys that were asked for.
    """

    values: dict[str, Any]
    path: Path
    read: set[str] = dataclasses.field(default_factory=set)

    def take(self, key: str, *default: Any) -> Any:
        """Returns a value, or the default; ValueError where there is neither."""
        self.read.add(key)
        if key not in self.values and not default:
            raise ValueError(f"{self.path} lacks the metadata key {key!r}")
        return self.values.get(key, *default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses any value but the allowed ones; an absent key is fine."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{self.path}: metadata key {key!r} is {value!r}; only "
                f"{' or '.join(map(repr, allowed))} is implemented"
            )

    def finish(self) -> None:
        """Raises ValueError naming the keys that nothing read and that are not known as inert."""
        unknown = [
            f"{key}={str(value)[:40]!r}"
            for key, value in self.values.items()
            if key not in self.read and not INERT.fullmatch(key)
        ]
        if unknown:
            raise ValueError(f"{self.path}: metadata keys that nothing maps: {', '.join(unknown)}")


# Keys that say nothing about the function computed. GGUF.* are the reader's own.
INERT = re.compile(
    r"GGUF\..*|general\..*|quantize\..*|tokenizer\.chat_templates?(\..*)?|tokenizer\.ggml\.scores"
    r"|tokenizer\.ggml\.(add_space_prefix|(unknown|eot|eom|sep(a|e)rator|cls|mask)_token_id)"
    r"|tokenizer\.ggml\.((prefix|suffix|middle)_token_id|fim_\w+_token_id)|tokenizer\.huggingface\..*"
)
# Key without its architecture -> key of the Hugging Face config of the family of that name.
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "vocab_size": "vocab_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}


def read_config(metadata: Metadata) -> tuple[Family, dict[str, Any]]:
    """Returns the family of a file, and what its metadata say as a Hugging Face config."""
    metadata.expect("general.quantization_version", 2)
    metadata.expect("split.count", 0, 1)
    architecture = metadata.take("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{metadata.path} is of the architecture {architecture!r}; 'llama' is implemented"
        )
    config: dict[str, Any] = {"model_type": "llama"}
    for key, theirs in {**KEYS, **OPTIONAL}.items():
        value = metadata.take(f"llama.{key}", *([] if key in KEYS else [None]))
        if isinstance(value, float):  # The shortest decimal of the fp32 that is stored: 1e-05.
            value = float(str(np.float32(value)))
        if isinstance(value, list):
            raise ValueError(
                f"{metadata.path}: metadata key 'llama.{key}' differs by layer, which is not "
                "implemented"
            )
        if value is not None:
            config[theirs] = value
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    metadata.expect("llama.attention.value_length", head_dim)
    metadata.expect("llama.rope.dimension_count", head_dim)
    metadata.expect("llama.rope.scaling.type", "none")
    metadata.expect("llama.expert_count", 0)
    metadata.expect("llama.expert_used_count", 0)
    metadata.expect("llama.attention.causal", True)
    return get_family("llama"), config


@dataclasses.dataclass(frozen=True)
class Interleaved(Linear):
    """A `Linear` of queries or keys whose rotary pairs are neighbours there, (2i, 2i + 1)."""

    def read(self, array: np.ndarray, shapes):
        _, heads, dim = shapes[0]
        apart = array.reshape(heads, dim // 2, 2, -1).swapaxes(1, 2)
        return super().read(apart.reshape(array.shape), shapes)

    def write(self, arrays) -> np.ndarray:
        _, heads, dim = arrays[0].shape
        matrix = super().write(arrays)
        return matrix.reshape(heads, 2, dim // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
}


def rename(row: Weight) -> Weight:
    """Returns a row of a family's table of weights as GGUF has it."""
    name = NAMES[row.theirs]
    layout = Interleaved() if name.endswith(("attn_q.weight", "attn_k.weight")) else row.layout
    return dataclasses.replace(row, theirs=name, layout=layout)


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each dequantized to fp32 when it is asked for."""

    def __init__(self, reader: gguf.GGUFReader, path: Path):
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name} is stored as {tensor.tensor_type.name}, which the "
                "gguf package does not dequantize"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut into pieces before merges, by the name that files give to it.
PIECES = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), PIECES["gpt-2"]()]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
CONTROL, USER_DEFINED = 3, 4  # Kinds of tokens that text is searched for before it is cut.


def read_tokenizer(metadata: Metadata) -> SubwordTokenizer:
    """Returns the byte-level BPE tokenizer of a file, with its special tokens and chat template.

    Raises:
      ValueError: for another kind of tokenizer, or an unknown way to cut text into pieces.
    """

    def take(key: str, *default: Any) -> Any:
        return metadata.take(f"tokenizer.ggml.{key}", *default)

    metadata.expect("tokenizer.ggml.model", "gpt2")
    metadata.expect("tokenizer.ggml.pre", *PIECES)
    metadata.expect("tokenizer.ggml.add_eos_token", False)
    tokens, pre = take("tokens"), take("pre")
    kinds = take("token_type", [1] * len(tokens))
    merges = [tuple(pair.split(" ", 1)) for pair in take("merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # The library raises bare exceptions.
        raise ValueError(f"{metadata.path} holds no tokenizer that can be read: {error}") from error
    library = tokenizers.Tokenizer(bpe)
    library.pre_tokenizer = PIECES[pre]()
    library.decoder = decoders.ByteLevel()
    library.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    names = {"pad": "padding_token_id", "bos": "bos_token_id", "eos": "eos_token_id"}
    ids = {name: take(key, None) for name, key in names.items()}
    wrong = {key: i for key, i in ids.items() if i is not None and not 0 <= i < len(tokens)}
    if wrong:
        raise ValueError(f"{metadata.path}: special tokens outside the vocabulary: {wrong}")
    return SubwordTokenizer(
        library,
        **{name: None if i is None else tokens[i] for name, i in ids.items()},
        starts=take("add_bos_token", pre == "llama-bpe"),
        chat_template=metadata.take("tokenizer.chat_template", None),
    )
