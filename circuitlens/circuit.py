"""Circuit: a set of heads that knows where it comes from."""

from __future__ import annotations

import html
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.errors import InputError
from circuitlens.graphs import heads_of_graph, write_graph
from circuitlens.nodes import Head
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_json, whole, write_json

if TYPE_CHECKING:
    from circuitlens.models.hooked import HookedModel

__all__ = ["Circuit"]

_SCHEMA = "circuitlens.circuit/2"


@dataclass(frozen=True)
class Circuit:
    """A set of heads of one model, in order of layer and index.

    Make one from scores (:meth:`circuitlens.HeadScores.top`) or with :meth:`of`. Circuits are equal
    if their heads and the sizes of their models are, wherever they come from. ``|``, ``&``, ``-``
    and ``^`` combine and ``<=``, ``<``, ``>=`` and ``>`` compare circuits of models of one size as
    sets; the right operand may be a set of heads.

    Attributes:
        heads: the heads, sorted and without repetition.
        n_layers, n_heads: size of the model's head grid.
        selection: how the heads were chosen, such as ``cdt: top 8``.
        provenance: where the scores come from, if from scores.
        levels: level of every head, 1 for those that move the task margin itself, if the circuit
            was found level by level (:func:`circuitlens.discover`).
        edges: score of pairs (source head, target head) from the same search.
        names: what you call some of the heads (:meth:`named`); shown in figures and reports.
    """

    heads: tuple[Head, ...]
    n_layers: int
    n_heads: int
    selection: str = field(default="by hand", compare=False)
    provenance: Provenance | None = field(default=None, compare=False)
    levels: Mapping[Head, int] = field(default_factory=dict, compare=False)
    edges: Mapping[tuple[Head, Head], float] = field(default_factory=dict, compare=False)
    names: Mapping[Head, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(sorted(set(self.heads))))
        for head in self.heads:
            if not (0 <= head.layer < self.n_layers and 0 <= head.index < self.n_heads):
                raise InputError(
                    f"The circuit names head {head}, but the model has {self.n_layers} layers of "
                    f"{self.n_heads} heads."
                )

    @classmethod
    def of(
        cls, heads: Iterable[Head | str | tuple[int, int]], n_layers: int, n_heads: int
    ) -> Circuit:
        """Make a circuit from heads, names such as ``"a3.h5"``, or pairs (layer, index).

        Raises:
            InputError: for anything else, or a head that the model does not have.
        """
        return cls(tuple(map(_head, heads)), n_layers, n_heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        return (_head(head) if isinstance(head, Sequence) else head) in self.heads

    def __getitem__(self, key: object) -> NoReturn:
        raise InputError(
            f"A circuit is a set, so there is no circuit[{key!r}]: use circuit.heads[{key!r}], or "
            "ask whether 'a3.h5' in circuit."
        )

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.heads))
        return f"Circuit({len(self)} of {self.n_layers * self.n_heads} heads: {names})"

    # -- names -----------------------------------------------------------------------------

    def named(self, names: Mapping[Head | str, str]) -> Circuit:
        """Return the circuit with names for some of its heads, such as ``{"a0.h3": "negation"}``.

        Names that it already has stay, unless they are given again; an empty one removes a name.

        Raises:
            InputError: for a head that is not in the circuit, or a name that is not a string.
        """
        found = dict(self.names)
        for key, name in names.items():
            head = _head(key)
            if head not in self.heads:
                raise InputError(f"Head {head} is not in the circuit, so it cannot be named here.")
            if not isinstance(name, str):
                raise InputError(f"The name of {head} must be a string, but is {name!r}.")
            found[head] = " ".join(name.split())
        return replace(self, names={head: name for head, name in found.items() if name})

    def label(self, head: Head) -> str:
        """Write a head with its name, if it has one: ``a0.h3 (negation)``."""
        return f"{head} ({self.names[head]})" if head in self.names else str(head)

    # -- set algebra -----------------------------------------------------------------------

    def _other(self, other: object) -> Circuit | None:
        """The other side of an operator as a circuit, or None if it is not a set of heads.

        Raises:
            InputError: for a circuit of a model of another size.
        """
        if isinstance(other, AbstractSet):
            return Circuit.of(other, self.n_layers, self.n_heads)
        if not isinstance(other, Circuit):
            return None
        if (self.n_layers, self.n_heads) != (other.n_layers, other.n_heads):
            raise InputError(
                f"Circuits of different models cannot be combined or compared: {self.n_layers} × "
                f"{self.n_heads} heads and {other.n_layers} × {other.n_heads}."
            )
        return other

    def _combine(
        self, other: Circuit, by: Callable[[set[Head], set[Head]], set[Head]], sign: str
    ) -> Circuit:
        selection = f"({self.selection}) {sign} ({other.selection})"
        heads = by(set(self.heads), set(other.heads))
        names = {h: name for h, name in {**other.names, **self.names}.items() if h in heads}
        return Circuit(tuple(heads), self.n_layers, self.n_heads, selection, names=names)

    def __or__(self, other: Circuit | AbstractSet[Head]) -> Circuit:
        """Union."""
        right = self._other(other)
        return NotImplemented if right is None else self._combine(right, operator.or_, "|")

    def __and__(self, other: Circuit | AbstractSet[Head]) -> Circuit:
        """Intersection."""
        right = self._other(other)
        return NotImplemented if right is None else self._combine(right, operator.and_, "&")

    def __sub__(self, other: Circuit | AbstractSet[Head]) -> Circuit:
        """Difference."""
        right = self._other(other)
        return NotImplemented if right is None else self._combine(right, operator.sub, "-")

    def __xor__(self, other: Circuit | AbstractSet[Head]) -> Circuit:
        """Heads that are in only one of the two."""
        right = self._other(other)
        return NotImplemented if right is None else self._combine(right, operator.xor, "^")

    def __le__(self, other: Circuit | AbstractSet[Head]) -> bool:
        """Whether all heads are also in the other."""
        right = self._other(other)
        return NotImplemented if right is None else set(self.heads) <= set(right.heads)

    def __lt__(self, other: Circuit | AbstractSet[Head]) -> bool:
        """Whether all heads are in the other, which has more."""
        right = self._other(other)
        return NotImplemented if right is None else set(self.heads) < set(right.heads)

    def __ge__(self, other: Circuit | AbstractSet[Head]) -> bool:
        """Whether all heads of the other are here too."""
        right = self._other(other)
        return NotImplemented if right is None else set(self.heads) >= set(right.heads)

    def __gt__(self, other: Circuit | AbstractSet[Head]) -> bool:
        """Whether all heads of the other are here, and more."""
        right = self._other(other)
        return NotImplemented if right is None else set(self.heads) > set(right.heads)

    def complement(self) -> Circuit:
        """All heads of the model that are not in the circuit."""
        own = set(self.heads)
        rest = tuple(
            head
            for layer in range(self.n_layers)
            for index in range(self.n_heads)
            if (head := Head(layer, index)) not in own
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

    def check_model(self, model: HookedModel) -> None:
        """Reject a model with another grid of heads.

        Raises:
            InputError: if layers or heads differ in number.
        """
        g = model.geometry
        if (self.n_layers, self.n_heads) != (g.n_layers, g.n_heads):
            raise InputError(
                f"The circuit is of a {self.n_layers} × {self.n_heads} model, but {model.name} has "
                f"{g.n_layers} layers of {g.n_heads} heads: choose a circuit of this model."
            )

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
            "names": {str(head): name for head, name in self.names.items()},
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
            names={Head.parse(h): str(n) for h, n in content.get("names", {}).items()},
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_json(Path(path), _SCHEMA, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote."""
        with whole(path):
            return cls.from_dict(read_json(Path(path), _SCHEMA))

    def save_graph(
        self,
        path: str | Path,
        model: HookedModel,
        scores: Float[Tensor, "layer head"] | None = None,
    ) -> None:
        """Write the circuit as a graph that EAP-IG and MIB read (:mod:`circuitlens.graphs`).

        Args:
            path: of the JSON file.
            model: the model of the circuit.
            scores: of the nodes, such as ``scores.mean`` of :class:`circuitlens.HeadScores`.

        Raises:
            InputError: if the circuit is of a model of another size.
        """
        self.check_model(model)
        write_graph(
            Path(path),
            self.heads,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=model.geometry.d_model,
            parallel=bool(getattr(model.bridge.cfg, "parallel_attn_mlp", False)),
            scores=None
            if scores is None
            else {head: float(scores[head.layer, head.index]) for head in model.geometry},
        )

    @classmethod
    def load_graph(cls, path: str | Path) -> Circuit:
        """Read the heads of a graph that EAP-IG or MIB wrote as JSON; MLPs are left out.

        Raises:
            InputError: if the file is not such a graph.
        """
        heads, n_layers, n_heads = heads_of_graph(Path(path))
        return cls(tuple(heads), n_layers, n_heads, f"from {Path(path).name}")

    def to_frame(self) -> pd.DataFrame:
        """Return one row per head, with its level and its name if there are any."""
        rows = [{"head": str(h), "layer": h.layer, "index": h.index} for h in self.heads]
        frame = pd.DataFrame(rows, columns=["head", "layer", "index"])
        if self.levels:
            # A head that was added by hand has none.
            frame["level"] = pd.array([self.levels.get(h) for h in self.heads], dtype="Int64")
        if self.names:
            frame["name"] = [self.names.get(h, "") for h in self.heads]
        return frame

    def edge_frame(self) -> pd.DataFrame:
        """Return one row per edge, the strongest first."""
        rows = [(str(s), str(t), score) for (s, t), score in self.edges.items()]
        frame = pd.DataFrame(rows, columns=["source", "target", "score"])
        return frame.sort_values("score", ascending=False, ignore_index=True)

    def _repr_html_(self) -> str:
        names = html.escape(", ".join(map(self.label, self.heads))) or "no heads"
        return (
            f"<p><b>Circuit</b> ({html.escape(self.selection)}): {len(self)} of "
            f"{self.n_layers * self.n_heads} heads: {names}</p>"
        )


def _head(head: object) -> Head:
    if isinstance(head, Head):
        return head
    if isinstance(head, str):
        return Head.parse(head)
    if isinstance(head, Sequence) and len(head) == 2 and all(isinstance(n, Integral) for n in head):
        return Head(int(head[0]), int(head[1]))
    raise InputError(f"{head!r} is not a head: write cl.Head(3, 5), 'a3.h5' or (3, 5).")
