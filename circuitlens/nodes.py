"""Nodes of a circuit: attention heads and MLPs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from circuitlens.errors import InputError
from circuitlens.geometry import Head

__all__ = ["MLP", "Node", "parse_node"]

_MLP_NAME = re.compile(r"m(\d+)")


@dataclass(frozen=True, order=True)
class MLP:
    """The MLP of a layer (all its experts, in a mixture), printed ``m3``."""

    layer: int

    def __str__(self) -> str:
        return f"m{self.layer}"


Node = Head | MLP


def parse_node(name: str) -> Node:
    """Read ``a3.h5`` or ``m3``.

    Raises:
        InputError: if ``name`` is of neither form.
    """
    if match := _MLP_NAME.fullmatch(name):
        return MLP(int(match[1]))
    try:
        return Head.parse(name)
    except InputError:
        raise InputError(
            f"{name!r} is no node name; write a<layer>.h<index> for a head, such as a3.h5, or "
            "m<layer> for an MLP."
        ) from None
