"""Weights in 16 bits, in which a training step is often smaller than the last bit."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["in_16_bits", "widen"]

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def in_16_bits(module: nn.Module) -> bool:
    """Whether any weights are in bfloat16 or float16."""
    return any(p.dtype in _SIXTEEN_BITS for p in module.parameters())


def widen(module: nn.Module) -> None:
    """Turn a module with weights in 16 bits into one in float32, which changes no number."""
    if in_16_bits(module):
        module.float()
