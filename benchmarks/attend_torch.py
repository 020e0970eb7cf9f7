"""The contestant of `benchmarks.attention` that runs on torch; nothing here imports jax."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.inputs import attention_operands
from benchmarks.torches import DEVICE, device_peak
from benchmarks.worker import Work


def make(dtype: str, tokens: int, about: str) -> Work:
    """Returns the work of `scaled_dot_product_attention`, forwards and backwards.

    A window is handed over as booleans, as it has no other way; causality by its name.

    Args: as of `benchmarks.attend_jax.make`.
    """
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32

    @cache
    def operands(length: int, window: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        arrays = attention_operands(tokens // length, length)
        found = [torch.from_numpy(x).to(DEVICE, kind).transpose(1, 2).contiguous() for x in arrays]
        mask = None
        if window:
            distance = torch.arange(length)[:, None] - torch.arange(length)
            mask = ((distance >= 0) & (distance < window)).to(DEVICE)
        return [x.requires_grad_(index < 3) for index, x in enumerate(found)], mask

    def run(count: int, length: int, window: int) -> list[dict[str, Any]]:
        (q, k, v, weigh), mask = operands(length, window)
        values = []
        for _ in range(count):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            loss = (out.float() * weigh).sum()
            grads = torch.autograd.grad(loss, (q, k, v))
            sizes = [float(grad.float().abs().sum()) for grad in grads]
            values.append({"loss": float(loss), "gradients": sum(sizes)})
        return values

    return Work(run, {"settings": about}, device_peak)
