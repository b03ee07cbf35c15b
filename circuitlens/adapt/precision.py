"""Training 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["in_float32"]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the block, parameters in bfloat16 or float16 are float32; afterwards they are rounded.

    AdamW's small steps are lost in 16 bits, and its ε is zero in float16. A parameter that does not
    change comes back with the same bits.
    """
    halves = {p: p.data for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for parameter, half in halves.items():
        parameter.data = half.float()
    try:
        yield
    finally:
        for parameter, half in halves.items():
            # A gradient in float32 does not fit a parameter in 16 bits.
            parameter.grad = None
            # Into the old storage: the hooked view may hold parts of it.
            parameter.data = half.copy_(parameter.data)
