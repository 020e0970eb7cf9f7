"""A tiny llama as a GGUF file, every weight random, in any type of tensor."""

import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lm.data.tokenizer import train_bpe

D, F, HEADS, KV_HEADS, LAYERS, LENGTH = 256, 256, 4, 2, 2, 64
TEXT = "Police say the mayor's 2024 vote\n\nwas 15,000 to  3 in Zürich, don't they? It's   7.\tOK "
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
# Of the types that gguf can read and not write: where the fp16 scales lie in a block, and the
# largest number that they multiply.
SCALES = {
    Kind.Q2_K: ((80, 82), 3 * 15),
    Kind.Q3_K: ((108,), 4 * 32),
    Kind.Q4_K: ((0, 2), 15 * 63),
    Kind.Q5_K: ((0, 2), 31 * 63),
    Kind.Q6_K: ((208,), 32 * 128),
}


def shapes(vocab_size: int, tied: bool) -> dict[str, tuple[int, ...]]:
    kv = D * KV_HEADS // HEADS
    layer = {
        "attn_norm": (D,),
        "attn_q": (D, D),
        "attn_k": (kv, D),
        "attn_v": (kv, D),
        "attn_output": (D, D),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    found = {f"blk.{i}.{name}.weight": s for i in range(LAYERS) for name, s in layer.items()}
    found |= {"token_embd.weight": (vocab_size, D), "output_norm.weight": (D,)}
    return found if tied else found | {"output.weight": (vocab_size, D)}


def encode(array: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Returns an array as a type of tensor; of types that gguf cannot write, random blocks."""
    if kind not in SCALES:
        return gguf.quantize(array, kind)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (array.shape[0], size), np.uint8)
    places, largest = SCALES[kind]
    for place in places:
        scale = rng.uniform(0.2, 0.4, (array.shape[0], 1)).astype(np.float16) / np.float16(largest)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks


def write(path, kind: Kind = Kind.F32, *, tied=False, pre="gpt-2", drop=(), change=(), more=()):
    """Writes the model; returns its arrays as gguf's own dequantizer reads them.

    Args:
      kind: of all matrices; vectors are F32.
      tied: whether it has no tensor for the head.
      pre: name of the pre-tokenizer.
      drop: metadata keys and tensors to leave out.
      change: metadata key -> value, in place of or beside the usual.
      more: tensor -> array, beside the usual.
    """
    rng = np.random.default_rng(0)
    tokenizer = train_bpe([TEXT], 300)
    vocabulary = tokenizer.library.get_vocab()
    merges = json.loads(tokenizer.library.to_str())["model"]["merges"]
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.context_length": LENGTH,
        "llama.embedding_length": D,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-3,
        "llama.rope.freq_base": 500.0,
        "llama.rope.dimension_count": D // HEADS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [3] + [1] * (len(vocabulary) - 1),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= dict(change)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if key in drop:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    arrays = {}
    for name, shape in shapes(len(vocabulary), tied).items():
        one = len(shape) == 1
        array = rng.normal(1.0 if one else 0.0, 0.1, shape).astype(np.float32)
        data, raw = (array, Kind.F32) if one else (encode(array, kind, rng), kind)
        if name not in drop:
            writer.add_tensor(name, data, raw_dtype=raw)
            arrays[name] = array if one else gguf.dequantize(data, kind)
    for name, array in dict(more).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
