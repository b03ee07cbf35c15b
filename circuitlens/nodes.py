"""Nodes of a circuit: attention heads, heads at one position, MLPs, and neurons of MLPs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from circuitlens.errors import InputError

__all__ = ["MLP", "AnyNode", "Head", "HeadAt", "Neuron", "Node", "parse_node"]

_HEAD_NAME = re.compile(r"a(\d+)\.h(\d+)")
_NODE_NAME = re.compile(r"(?:a(\d+)\.h(\d+)(?:@(-\d+))?|m(\d+)(?:\.n(\d+))?)")


@dataclass(frozen=True, order=True)
class Head:
    """An attention head, printed ``a3.h5``: layer 3, query head 5, both counted from 0."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"a{self.layer}.h{self.index}"

    @classmethod
    def parse(cls, name: str) -> Head:
        """Read ``a3.h5``.

        Raises:
            InputError: if ``name`` is not of that form.
        """
        match = _HEAD_NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{name!r} is not a head name; write a<layer>.h<index>, as in a3.h5.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, order=True)
class MLP:
    """The MLP of a layer (all its experts, in a mixture), printed ``m3``."""

    layer: int

    def __str__(self) -> str:
        return f"m{self.layer}"


@dataclass(frozen=True, order=True)
class Neuron:
    """A neuron of an MLP, printed ``m3.n12``: an entry of what the output map of layer 3 reads."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"m{self.layer}.n{self.index}"


@dataclass(frozen=True, order=True)
class HeadAt:
    """A head at one position of prompts of one template, printed ``a3.h5@-1``.

    Positions are counted from the end of the prompt: -1 is its last token.
    """

    layer: int
    index: int
    position: int

    def __str__(self) -> str:
        return f"a{self.layer}.h{self.index}@{self.position}"


Node = Head | MLP
AnyNode = Node | Neuron | HeadAt


def parse_node(name: str) -> AnyNode:
    """Read ``a3.h5``, ``a3.h5@-1``, ``m3`` or ``m3.n12``.

    Raises:
        InputError: if ``name`` is not one of these.
    """
    match = _NODE_NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name!r} is not a node name; write a3.h5 (a head), a3.h5@-1 (at the last token), m3 "
            "(an MLP) or m3.n12 (a neuron)."
        )
    layer, head, position, mlp, neuron = (None if g is None else int(g) for g in match.groups())
    if layer is not None and head is not None:
        return Head(layer, head) if position is None else HeadAt(layer, head, position)
    assert mlp is not None
    return MLP(mlp) if neuron is None else Neuron(mlp, neuron)
