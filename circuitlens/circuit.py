"""Circuit: a set of heads that knows where it comes from."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from circuitlens.errors import InputError
from circuitlens.geometry import Head
from circuitlens.provenance import Provenance
from circuitlens.storage import read_json, write_json

__all__ = ["Circuit"]

_SCHEMA = "circuitlens.circuit/2"


@dataclass(frozen=True)
class Circuit:
    """A set of heads of one model, in order of layer and index.

    Make one from scores (:meth:`circuitlens.HeadScores.top`) or with :meth:`of`.

    Attributes:
        heads: the heads, sorted and without repetition.
        n_layers, n_heads: size of the model's head grid.
        selection: how the heads were chosen, such as ``cdt: top 8``.
        provenance: where the scores come from, if from scores.
        levels: level of every head, 1 for those that move the task margin itself, if the circuit
            was found level by level (:func:`circuitlens.discover`).
        edges: score of pairs (source head, target head) from the same search.
    """

    heads: tuple[Head, ...]
    n_layers: int
    n_heads: int
    selection: str = "by hand"
    provenance: Provenance | None = field(default=None, compare=False)
    levels: Mapping[Head, int] = field(default_factory=dict, compare=False)
    edges: Mapping[tuple[Head, Head], float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(sorted(set(self.heads))))
        for head in self.heads:
            if not (0 <= head.layer < self.n_layers and 0 <= head.index < self.n_heads):
                raise InputError(
                    f"The circuit names head {head}, but the model has {self.n_layers} layers of "
                    f"{self.n_heads} heads."
                )

    @classmethod
    def of(cls, heads: Iterable[Head | str], n_layers: int, n_heads: int) -> Circuit:
        """Make a circuit from heads or names such as ``"a3.h5"``."""
        parsed = tuple(h if isinstance(h, Head) else Head.parse(h) for h in heads)
        return cls(parsed, n_layers, n_heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in set(self.heads)

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.heads))
        return f"Circuit({len(self)} of {self.n_layers * self.n_heads} heads: {names})"

    # -- set algebra -----------------------------------------------------------------------

    def _combine(self, other: Circuit, heads: set[Head], sign: str) -> Circuit:
        if (self.n_layers, self.n_heads) != (other.n_layers, other.n_heads):
            raise InputError(
                f"Circuits of different models cannot be combined: {self.n_layers} × "
                f"{self.n_heads} heads and {other.n_layers} × {other.n_heads}."
            )
        selection = f"({self.selection}) {sign} ({other.selection})"
        return Circuit(tuple(heads), self.n_layers, self.n_heads, selection)

    def __or__(self, other: Circuit) -> Circuit:
        """Union."""
        return self._combine(other, set(self.heads) | set(other.heads), "|")

    def __and__(self, other: Circuit) -> Circuit:
        """Intersection."""
        return self._combine(other, set(self.heads) & set(other.heads), "&")

    def __sub__(self, other: Circuit) -> Circuit:
        """Difference."""
        return self._combine(other, set(self.heads) - set(other.heads), "-")

    def complement(self) -> Circuit:
        """All heads of the model that are not in the circuit."""
        rest = tuple(
            head
            for layer in range(self.n_layers)
            for index in range(self.n_heads)
            if (head := Head(layer, index)) not in self
        )
        return Circuit(rest, self.n_layers, self.n_heads, f"all but ({self.selection})")

    def random_like(self, seed: int = 0, *, by_layer: bool = False) -> Circuit:
        """As many heads drawn at random: a control.

        Args:
            seed: of the draw.
            by_layer: draw as many in every layer as this circuit has there.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: list[Head], count: int) -> list[Head]:
            order = torch.randperm(len(heads), generator=generator)
            return [heads[i] for i in order[:count]]

        rows = [
            [Head(layer, index) for index in range(self.n_heads)] for layer in range(self.n_layers)
        ]
        if by_layer:
            counts = [sum(head.layer == layer for head in self) for layer in range(self.n_layers)]
            chosen = [
                head for row, count in zip(rows, counts, strict=True) for head in draw(row, count)
            ]
        else:
            chosen = draw([head for row in rows for head in row], len(self))
        how = "at random, layer by layer" if by_layer else "at random"
        selection = f"{len(self)} {how} (seed {seed})"
        return Circuit(tuple(chosen), self.n_layers, self.n_heads, selection, self.provenance)

    def overlap(self, other: Circuit) -> float:
        """Jaccard index: heads in both over heads in either (1 for two empty circuits)."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    # -- files -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {
            "heads": [str(head) for head in self.heads],
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "selection": self.selection,
            "provenance": self.provenance.to_dict() if self.provenance else None,
            "levels": {str(head): level for head, level in self.levels.items()},
            "edges": [[str(s), str(t), score] for (s, t), score in self.edges.items()],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Circuit:
        """Rebuild what :meth:`to_dict` returned."""
        origin = content["provenance"]
        return cls(
            heads=tuple(map(Head.parse, content["heads"])),
            n_layers=content["n_layers"],
            n_heads=content["n_heads"],
            selection=content["selection"],
            provenance=Provenance.from_dict(origin) if origin else None,
            levels={Head.parse(name): level for name, level in content["levels"].items()},
            edges={(Head.parse(s), Head.parse(t)): e for s, t, e in content["edges"]},
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_json(Path(path), _SCHEMA, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote."""
        try:
            return cls.from_dict(read_json(Path(path), _SCHEMA))
        except KeyError as error:
            raise InputError(f"{path} lacks the entry {error}, so it is no circuit.") from error

    def to_frame(self) -> pd.DataFrame:
        """Return one row a head, with its level if there are levels."""
        rows = [{"head": str(h), "layer": h.layer, "index": h.index} for h in self.heads]
        frame = pd.DataFrame(rows, columns=["head", "layer", "index"])
        if self.levels:
            frame["level"] = [self.levels[head] for head in self.heads]
        return frame

    def edge_frame(self) -> pd.DataFrame:
        """Return one row an edge, the strongest first."""
        rows = [(str(s), str(t), score) for (s, t), score in self.edges.items()]
        frame = pd.DataFrame(rows, columns=["source", "target", "score"])
        return frame.sort_values("score", ascending=False, ignore_index=True)

    def _repr_html_(self) -> str:
        names = ", ".join(map(str, self.heads)) or "no heads"
        return (
            f"<p><b>Circuit</b> ({html.escape(self.selection)}): {len(self)} of "
            f"{self.n_layers * self.n_heads} heads: {names}</p>"
        )
