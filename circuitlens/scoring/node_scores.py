"""Scores of other nodes than heads alone: heads with MLPs, heads at positions, neurons."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.errors import InputError
from circuitlens.models.batch import Positions
from circuitlens.node_circuit import NodeCircuit, NodeGrid
from circuitlens.nodes import AnyNode
from circuitlens.scoring.head_scores import HeadScores, head_count
from circuitlens.utils.bootstrap import percentiles, resampled_means
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = ["NodeScores"]

_SCHEMA = "circuitlens.node-scores/1"
_ROWS = 1000


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores:
    """Relevance of every node of a grid for every example.

    Of neurons it comes from :func:`circuitlens.neuron_relevance`; heads with MLPs, and heads at
    positions, are views of :class:`circuitlens.HeadScores` that have them: :meth:`with_mlps`,
    :meth:`at_positions`.

    Attributes:
        per_example: signed relevance, in ``unit``.
        grid: what a column is.
        method: how it was computed.
        positions: where nodes deviated from their means.
        example_ids: the examples, in order.
        provenance: where it comes from.
        unit: of the relevance.
    """

    per_example: Float[Tensor, "example layer column"]
    grid: NodeGrid
    method: str
    positions: Positions
    example_ids: tuple[str, ...]
    provenance: Provenance
    unit: str = "logits"

    @classmethod
    def with_mlps(cls, scores: HeadScores) -> NodeScores:
        """Heads and MLPs in one ranking.

        Raises:
            InputError: if MLPs were not scored.
        """
        if scores.mlps is None:
            raise InputError("These scores are of heads only: call cl.relevance with mlps=True.")
        both = torch.cat([scores.per_example, scores.mlps[..., None]], dim=-1)
        grid = NodeGrid("heads+mlps", scores.n_layers, scores.n_heads + 1, scores.n_heads)
        return cls._of(scores, both, grid)

    @classmethod
    def at_positions(cls, scores: HeadScores) -> NodeScores:
        """Heads at every position of prompts of one template.

        Raises:
            InputError: if positions were not scored by themselves.
        """
        at = scores.by_position
        if at is None:
            raise InputError(
                "These scores are sums over positions: call cl.relevance with by_position=True."
            )
        width = at.shape[1] * scores.n_heads
        grid = NodeGrid("heads@positions", scores.n_layers, width, scores.n_heads)
        return cls._of(scores, at.transpose(1, 2).flatten(2), grid)

    @classmethod
    def _of(cls, scores: HeadScores, values: Tensor, grid: NodeGrid) -> NodeScores:
        given = (scores.method, scores.positions, scores.example_ids, scores.provenance)
        return cls(values, grid, *given, scores.unit)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.grid.n_layers

    @property
    def n_heads(self) -> int:
        """Number of heads per layer, whatever the nodes are."""
        return self.grid.n_heads

    @property
    def mean(self) -> Float[Tensor, "layer column"]:
        """Mean over examples."""
        return self.per_example.double().mean(0)

    def ranking(self) -> list[AnyNode]:
        """All nodes, the most supporting one first."""
        order = self.mean.flatten().argsort(descending=True, stable=True)
        return [self.grid.node(*divmod(i, self.grid.width)) for i in order.tolist()]

    def top(self, size: int | float) -> NodeCircuit:
        """The nodes with the largest relevance.

        Args:
            size: how many (an integer), or which share of all (a float).
        """
        count = head_count(size, len(self.grid))
        nodes = tuple(self.ranking()[:count])
        return NodeCircuit(nodes, self.grid, f"{self.method}: top {count}", self.provenance)

    def to_frame(self, rows: int | None = _ROWS) -> pd.DataFrame:
        """Return one row per node, the most supporting one first, with 95 % bootstrap intervals.

        Args:
            rows: at most this many, as models have many neurons; ``None`` for all.
        """
        mean = self.mean.flatten()
        order = mean.argsort(descending=True, stable=True)[:rows]
        chosen = self.per_example.double().flatten(1)[:, order]
        low, high = percentiles(resampled_means(chosen.T.numpy(), self.provenance.seed), 0.95)
        nodes = [self.grid.node(*divmod(i, self.grid.width)) for i in order.tolist()]
        return pd.DataFrame(
            {
                "node": list(map(str, nodes)),
                "layer": [node.layer for node in nodes],
                "relevance": mean[order].numpy(),
                "low": np.asarray(low),
                "high": np.asarray(high),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        grid = self.grid
        meta = {
            "kind": grid.kind,
            "n_heads": grid.n_heads,
            "method": self.method,
            "positions": self.positions,
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
            "unit": self.unit,
        }
        write_tensors(Path(path), _SCHEMA, {"per_example": self.per_example.contiguous()}, meta)

    @classmethod
    def load(cls, path: str | Path) -> NodeScores:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            values = tensors["per_example"]
            return cls(
                values,
                NodeGrid(meta["kind"], values.shape[1], values.shape[2], meta["n_heads"]),
                meta["method"],
                meta["positions"],
                tuple(meta["example_ids"]),
                Provenance.from_dict(meta["provenance"]),
                meta["unit"],
            )

    def __repr__(self) -> str:
        return (
            f"NodeScores({self.method} on {self.provenance.task}: {len(self.grid)} "
            f"{self.grid.kind}, {len(self.example_ids)} examples)"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame(10).to_html(index=False, float_format="{:.4f}".format)
        return f"<p><b>NodeScores</b> {html.escape(repr(self))}</p>{table}"
