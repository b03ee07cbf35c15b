"""Counting what goes through a model, in passes of one prompt through all layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from circuitlens.utils.processes import summed

__all__ = ["PassCount", "beginning_at", "count_backward", "count_forward", "counting"]


@dataclass
class PassCount:
    """Prompts that went forward and backward; a run of the upper half of the layers is half one."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def both_ways(self) -> float:
        """In passes forward and backward, of which the way back takes two thirds."""
        return (self.forward + 2 * self.backward) / 3

    def per_prompt(self, prompts: int, device: torch.device | None) -> dict[str, float | int]:
        """Counts by prompt, as scores record them.

        Args:
            prompts: how many were scored.
            device: where processes that shared them add up their counts; ``None`` if each did all.
        """
        spent = torch.tensor([self.forward, self.backward], dtype=torch.float64)
        if device is not None:
            spent = summed(spent, device)
        forward, backward = (spent / prompts).tolist()
        return {"forward": forward, "backward": backward, "prompts": prompts}


_COUNTS: ContextVar[tuple[PassCount, ...]] = ContextVar("counts", default=())
_SHARE: ContextVar[float] = ContextVar("share", default=1.0)


@contextmanager
def counting() -> Iterator[PassCount]:
    """Count the passes of every model in this block."""
    count = PassCount()
    token = _COUNTS.set((*_COUNTS.get(), count))
    try:
        yield count
    finally:
        _COUNTS.reset(token)


@contextmanager
def beginning_at(layer: int, n_layers: int) -> Iterator[None]:
    """Passes in this block begin at a layer."""
    token = _SHARE.set(1 - layer / n_layers)
    try:
        yield
    finally:
        _SHARE.reset(token)


def count_forward(rows: float | int) -> None:
    """Add prompts that went forward."""
    for count in _COUNTS.get():
        count.forward += rows * _SHARE.get()


def count_backward(rows: float | int) -> None:
    """Add prompts that went backward."""
    for count in _COUNTS.get():
        count.backward += rows
