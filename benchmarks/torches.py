"""The peers that run on torch, each with its best documented settings.

All of them: sdpa attention, fused AdamW on the same groups, gradients set to None, the same
clipping, the loss read after every step. bf16 is autocast over fp32 parameters, the precision of
ours; `pure` stores parameters and optimizer state in bf16, too, which is less precise and cheaper.
Nothing here imports jax, so that a peer may live in an interpreter of its own.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.inputs import WEIGHTS, batches
from benchmarks.shapes import SHAPES
from benchmarks.worker import Work

RATE, DECAY, CLIP, BETAS, EPS = 1e-4, 0.1, 1.0, (0.9, 0.95), 1e-8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def train_by(
    model: torch.nn.Module,
    logits: Callable[[torch.Tensor], torch.Tensor],
    inputs: str,
    *,
    dtype: str,
    compile: bool = False,
    pure: bool = False,
    kind: str,
) -> Work:
    """Returns the work of training a torch model.

    Args:
      model: fp32, with its parameters.
      logits: tokens (B, T) to (B, T, V), by the model.
      inputs: directory of the batches.
      dtype: 'fp32' or 'bf16'.
      compile: whether forward pass and loss, and so the backward pass, go through `torch.compile`.
      pure: of bf16, whether parameters are stored in it.
      kind: what the report calls it.
    """
    if pure and dtype != "bf16":
        raise ValueError("'pure' is a way to compute in bf16: ask for --dtype bf16")
    if DEVICE == "cuda":
        # Products of fp32 by TensorFloat32, which XLA uses by default, too.
        torch.set_float32_matmul_precision("high")
    model.train().to(DEVICE, torch.bfloat16 if pure else None)
    lower = dtype == "bf16" and not pure
    ids = [torch.from_numpy(batch).long().to(DEVICE) for batch in batches(inputs)]

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16) if lower else nullcontext():
            scores = logits(tokens)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())

    compute = torch.compile(loss_of) if compile else loss_of
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        groups(model), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True
    )
    taken = 0

    def steps(count: int) -> list[float]:
        nonlocal taken
        losses = []
        for _ in range(count):
            batch = ids[taken % len(ids)]
            loss = compute(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            taken += 1
        return losses

    how = ("bf16 parameters" if pure else "bf16 autocast") if dtype == "bf16" else "fp32"
    facts = {
        "tokens": math.prod(ids[0][:, 1:].shape),
        "trained": sum(parameter.numel() for parameter in trained),
        "settings": f"{kind}, {how}, fused AdamW" + (", torch.compile" if compile else ""),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    }
    return Work(steps, facts, device_peak)


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Returns parameters that decay, the matrices that multiply activations, and the others."""
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2 and id(p) not in tables]
    chosen = {id(parameter) for parameter in matrices}
    return [
        {"params": matrices, "weight_decay": DECAY},
        {"params": [p for p in trained if id(p) not in chosen], "weight_decay": 0.0},
    ]


def open_transformers(inputs: str, fresh: bool = False, **options: Any) -> Any:
    """Returns the model of Hugging Face's transformers, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory = str(Path(inputs) / WEIGHTS)
    config = AutoConfig.from_pretrained(directory)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    options = dict(attn_implementation="sdpa", dtype=torch.float32) | options
    if fresh:
        return AutoModelForCausalLM.from_config(config, **options)
    return AutoModelForCausalLM.from_pretrained(directory, config=config, **options)


def transformers(
    shape: str,
    inputs: str,
    dtype: str,
    compile: bool = False,
    pure: bool = False,
    lora: bool = False,
    fresh: bool = False,
) -> Work:
    """Trains by Hugging Face's transformers; with `lora` by peft on them.

    Args:
      shape: a name in `SHAPES`.
      inputs: directory of the weights and batches.
      dtype, compile, pure: as of `train_by`.
      lora: rank 8 on what holds queries and values: GPT-2's fused projection, which is peft's own
        choice for it, and as many trained parameters as ours; elsewhere the two by themselves.
      fresh: whether to draw the parameters instead of reading them.
    """
    model = open_transformers(inputs, fresh)
    kind = "transformers, sdpa"
    if lora:
        from peft import LoraConfig, get_peft_model

        fused = SHAPES[shape].family == "gpt2"
        targets = ["c_attn"] if fused else ["q_proj", "v_proj"]
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=fused, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
        kind = f"peft LoRA of rank 8 on {' and '.join(targets)}; {kind}"

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    return train_by(model, logits, inputs, dtype=dtype, compile=compile, pure=pure, kind=kind)


class PostNorm(torch.nn.Module):
    """teenyGPT of torch's own encoder layers, which it was published as."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        super().__init__()
        vocab, width = tensors["embed/table"].shape
        layers, _, heads, _ = tensors[f"{BLOCK}/mixer/layer/q/kernel"].shape
        layer = torch.nn.TransformerEncoderLayer(
            width,
            heads,
            tensors[f"{BLOCK}/mlp/layer/up/kernel"].shape[-1],
            dropout=0.0,
            activation="gelu",
            batch_first=True,
        )
        places = tensors["stack/entry/positions/table"].shape[0]
        self.embed = torch.nn.Embedding(vocab, width)
        self.positions = torch.nn.Embedding(places, width)
        self.stack = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, vocab)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(places)
        self.register_buffer("mask", mask, persistent=False)
        self.load_state_dict(post_norm_tensors(tensors, layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        T = tokens.shape[1]
        x = self.embed(tokens) + self.positions.weight[:T]
        # With the hint, the layers run sdpa's causal kernel and need no mask.
        return self.head(self.stack(x, mask=self.mask[:T, :T], is_causal=True))


BLOCK = "stack/pattern/blocks_0"


def post_norm_tensors(tensors: dict[str, np.ndarray], layers: int) -> dict[str, torch.Tensor]:
    """Returns the state of `PostNorm` from our parameters, path -> array."""
    width = tensors["embed/table"].shape[1]
    found = {
        "embed.weight": tensors["embed/table"],
        "positions.weight": tensors["stack/entry/positions/table"],
        "head.weight": tensors["head/kernel"].T,
        "head.bias": tensors["head/bias"],
    }
    for layer in range(layers):
        ours = {
            path.removeprefix(f"{BLOCK}/"): leaf[layer]
            for path, leaf in tensors.items()
            if path.startswith(BLOCK)
        }
        packed = [ours[f"mixer/layer/{part}/kernel"].reshape(width, width).T for part in "qkv"]
        biases = [ours[f"mixer/layer/{part}/bias"].reshape(width) for part in "qkv"]
        block = {
            "self_attn.in_proj_weight": np.concatenate(packed),
            "self_attn.in_proj_bias": np.concatenate(biases),
            "self_attn.out_proj.weight": ours["mixer/layer/out/kernel"].reshape(width, width).T,
            "self_attn.out_proj.bias": ours["mixer/layer/out/bias"],
            "linear1.weight": ours["mlp/layer/up/kernel"].T,
            "linear1.bias": ours["mlp/layer/up/bias"],
            "linear2.weight": ours["mlp/layer/down/kernel"].T,
            "linear2.bias": ours["mlp/layer/down/bias"],
            "norm1.weight": ours["mixer/norm/scale"],
            "norm1.bias": ours["mixer/norm/bias"],
            "norm2.weight": ours["mlp/norm/scale"],
            "norm2.bias": ours["mlp/norm/bias"],
        }
        found |= {f"stack.layers.{layer}.{name}": leaf for name, leaf in block.items()}
    return {name: torch.from_numpy(np.array(leaf, order="C")) for name, leaf in found.items()}


def encoder(shape: str, inputs: str, dtype: str, compile: bool = False, pure: bool = False) -> Work:
    """Trains teenyGPT by `torch.nn.TransformerEncoder`; arguments as of `transformers`."""
    with np.load((Path(inputs) / WEIGHTS).with_suffix(".npz")) as file:
        model = PostNorm({name: file[name] for name in file})
    kind = "torch.nn.TransformerEncoder"
    return train_by(model, model, inputs, dtype=dtype, compile=compile, pure=pure, kind=kind)


def litgpt(
    shape: str,
    inputs: str,
    dtype: str,
    compile: bool = False,
    pure: bool = False,
    fresh: bool = False,
) -> Work:
    """Trains a Llama by litgpt; arguments as of `transformers`."""
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

    model = GPT(Config(**litgpt_config(SHAPES[shape].arguments)))
    if not fresh:
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((Path(inputs) / WEIGHTS).glob("*.safetensors")):
            tensors |= load_file(file)
        model.load_state_dict(litgpt_tensors(tensors, model.config.n_layer), strict=False)
    return train_by(
        model, model, inputs, dtype=dtype, compile=compile, pure=pure, kind="litgpt, sdpa"
    )


def litgpt_config(arguments: Any) -> dict[str, Any]:
    """Returns the fields of litgpt's config for the arguments of our Llama."""
    return dict(
        name="benchmark",
        block_size=arguments["max_length"],
        vocab_size=arguments["vocab_size"],
        padded_vocab_size=arguments["vocab_size"],
        n_layer=arguments["num_layers"],
        n_head=arguments["num_heads"],
        n_embd=arguments["num_features"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        intermediate_size=arguments["mlp_features"],
    )


def litgpt_tensors(
    tensors: dict[str, torch.Tensor], layers: Iterable[int] | int
) -> dict[str, torch.Tensor]:
    """Returns litgpt's tensors from those of a Hugging Face Llama."""
    found = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for layer in range(layers) if isinstance(layers, int) else layers:
        old, new = f"model.layers.{layer}.", f"transformer.h.{layer}."
        names = {
            "norm_1": "input_layernorm",
            "attn.proj": "self_attn.o_proj",
            "norm_2": "post_attention_layernorm",
            "mlp.fc_1": "mlp.gate_proj",
            "mlp.fc_2": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        }
        for theirs, name in names.items():
            found[f"{new}{theirs}.weight"] = tensors[f"{old}{name}.weight"]
        parts = [tensors[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"]
        found[f"{new}attn.qkv.weight"] = torch.cat(parts)
    return found
