"""Nodes of a circuit: attention heads and MLPs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from circuitlens.errors import InputError

__all__ = ["MLP", "Head", "Node"]

_HEAD_NAME = re.compile(r"a(\d+)\.h(\d+)")


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
            raise InputError(f"{name!r} is no head name; write a<layer>.h<index>, such as a3.h5.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, order=True)
class MLP:
    """The MLP of a layer (all its experts, in a mixture), printed ``m3``."""

    layer: int

    def __str__(self) -> str:
        return f"m{self.layer}"


Node = Head | MLP
