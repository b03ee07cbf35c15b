"""Nodes of a circuit: attention heads and MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from circuitlens.geometry import Head

__all__ = ["MLP", "Node"]


@dataclass(frozen=True, order=True)
class MLP:
    """The MLP of a layer (all its experts, in a mixture), printed ``m3``."""

    layer: int

    def __str__(self) -> str:
        return f"m{self.layer}"


Node = Head | MLP
