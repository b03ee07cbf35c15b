"""Circuits of other nodes than heads alone, and the grid in which such nodes lie.

A grid has one row per layer. Its columns are the heads of the layer (``heads``), the heads and then
the MLP (``heads+mlps``), the heads at every position counted from the end of the prompt
(``heads@positions``), or the neurons of the MLP (``neurons``). Ablation, random circuits and
rankings work on such grids and need not know what a column is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.nodes import MLP, AnyNode, Head, HeadAt, Neuron, parse_node
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_json, whole, write_json

if TYPE_CHECKING:
    from circuitlens.models.hooked import HookedModel

__all__ = ["NodeCircuit", "NodeGrid", "NodeKind"]

_SCHEMA = "circuitlens.node-circuit/1"

NodeKind = Literal["heads", "heads+mlps", "heads@positions", "neurons"]


@dataclass(frozen=True)
class NodeGrid:
    """All nodes of one kind in a model.

    Attributes:
        kind: what a column is (module docstring).
        n_layers: rows.
        width: columns.
        n_heads: heads per layer.
    """

    kind: NodeKind
    n_layers: int
    width: int
    n_heads: int

    def __len__(self) -> int:
        return self.n_layers * self.width

    def __iter__(self) -> Iterator[AnyNode]:
        for layer in range(self.n_layers):
            for column in range(self.width):
                yield self.node(layer, column)

    @property
    def n_positions(self) -> int:
        """Positions that are told apart."""
        return self.width // self.n_heads if self.kind == "heads@positions" else 1

    def node(self, layer: int, column: int) -> AnyNode:
        """The node at a place of the grid."""
        if self.kind == "neurons":
            return Neuron(layer, column)
        if self.kind == "heads@positions":
            position, index = divmod(column, self.n_heads)
            return HeadAt(layer, index, position - self.n_positions)
        return MLP(layer) if column == self.n_heads else Head(layer, column)

    def column(self, node: AnyNode) -> int:
        """The column of a node.

        Raises:
            InputError: if the grid does not have it.
        """
        column = self._column(node)
        if column is None or not (0 <= column < self.width and 0 <= node.layer < self.n_layers):
            raise InputError(
                f"There is no node {node} among the {self.kind} of {self.n_layers} layers with "
                f"{self.width} each."
            )
        return column

    def _column(self, node: AnyNode) -> int | None:
        """Where a node would be; ``None`` for one of another kind."""
        if self.kind == "neurons":
            return node.index if isinstance(node, Neuron) else None
        if isinstance(node, MLP):
            return self.n_heads if self.kind == "heads+mlps" else None
        # The column behind the last head is not a head's.
        if not isinstance(node, Head | HeadAt) or not 0 <= node.index < self.n_heads:
            return None
        if isinstance(node, Head):
            return node.index if self.kind != "heads@positions" else None
        if self.kind != "heads@positions" or not -self.n_positions <= node.position < 0:
            return None
        return (node.position + self.n_positions) * self.n_heads + node.index

    def mask(self, nodes: Iterable[AnyNode]) -> Bool[Tensor, "layer column"]:
        """Lay nodes out as a grid that is true where one of them is.

        Raises:
            InputError: for a node that the grid does not have.
        """
        mask = torch.zeros(self.n_layers, self.width, dtype=torch.bool)
        for node in nodes:
            mask[node.layer, self.column(node)] = True
        return mask


@dataclass(frozen=True)
class NodeCircuit:
    """A set of nodes of one grid: heads with MLPs, heads at positions, or neurons.

    Make one from scores (:meth:`circuitlens.NodeScores.top`) or with :meth:`of`; measure it with
    :func:`circuitlens.faithfulness`. Circuits are equal if their nodes and grids are.

    Attributes:
        nodes: without repetition, in the order of the grid.
        grid: where they lie.
        selection: how they were chosen.
        provenance: where the scores come from, if from scores.
    """

    nodes: tuple[AnyNode, ...]
    grid: NodeGrid
    selection: str = field(default="by hand", compare=False)
    provenance: Provenance | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        grid = self.grid
        placed = {(node.layer, grid.column(node)): node for node in self.nodes}
        object.__setattr__(self, "nodes", tuple(placed[place] for place in sorted(placed)))

    @classmethod
    def of(cls, nodes: Iterable[AnyNode | str], grid: NodeGrid) -> NodeCircuit:
        """Make a circuit from nodes or their names, such as ``"m3.n12"`` or ``"a3.h5@-1"``.

        Raises:
            InputError: for a node that the grid does not have.
        """
        return cls(tuple(parse_node(n) if isinstance(n, str) else n for n in nodes), grid)

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[AnyNode]:
        return iter(self.nodes)

    def __contains__(self, node: object) -> bool:
        return (parse_node(node) if isinstance(node, str) else node) in self.nodes

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.nodes[:8])) + ", …" * (len(self) > 8)
        return f"NodeCircuit({len(self)} of {len(self.grid)} {self.grid.kind}: {shown})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))} ({html.escape(self.selection)})</p>"

    def check_model(self, model: HookedModel) -> None:
        """Reject a model with another grid of heads.

        Raises:
            InputError: if layers or heads differ in number.
        """
        g, grid = model.geometry, self.grid
        if (grid.n_layers, grid.n_heads) != (g.n_layers, g.n_heads):
            raise InputError(
                f"The nodes are of a {grid.n_layers} × {grid.n_heads} model, but {model.name} has "
                f"{g.n_layers} layers of {g.n_heads} heads: score this model."
            )

    def heads(self) -> Circuit:
        """The heads among the nodes, at whatever positions, as a circuit that can be trained.

        Raises:
            InputError: for neurons, among which there is no head.
        """
        if self.grid.kind == "neurons":
            raise InputError(
                "A circuit of neurons has no heads: train neurons with strategy='neurons'."
            )
        found = {Head(n.layer, n.index) for n in self.nodes if isinstance(n, Head | HeadAt)}
        selection = f"heads of {self.selection}"
        grid = self.grid
        return Circuit(tuple(found), grid.n_layers, grid.n_heads, selection, self.provenance)

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        grid = self.grid
        content: dict[str, Any] = {
            "nodes": list(map(str, self.nodes)),
            "kind": grid.kind,
            "n_layers": grid.n_layers,
            "width": grid.width,
            "n_heads": grid.n_heads,
            "selection": self.selection,
            "provenance": self.provenance.to_dict() if self.provenance else None,
        }
        write_json(Path(path), _SCHEMA, content)

    @classmethod
    def load(cls, path: str | Path) -> NodeCircuit:
        """Read what :meth:`save` wrote."""
        with whole(path):
            found = read_json(Path(path), _SCHEMA)
            grid = NodeGrid(found["kind"], found["n_layers"], found["width"], found["n_heads"])
            origin = found["provenance"]
            return cls(
                tuple(map(parse_node, found["nodes"])),
                grid,
                found["selection"],
                Provenance.from_dict(origin) if origin else None,
            )
