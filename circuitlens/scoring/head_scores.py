"""HeadScores: the relevance of every head on every example.

Relevance is signed: positive means that the head's deviation from its mean supports the right
label. The unit is logits of task margin, unless the scorer has another (``unit``).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control, spearmanr, ttest_1samp
from torch import Tensor

from circuitlens.circuit import Circuit
from circuitlens.errors import InputError, check_choice
from circuitlens.models.batch import Positions
from circuitlens.nodes import Head
from circuitlens.utils.bootstrap import check_level, percentiles, resampled_means
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = ["HeadScores", "Stability", "head_count"]

_SCHEMA = "circuitlens.scores/2"

Control = Literal["each", "fdr"]


@dataclass(frozen=True)
class Stability:
    """Rank agreement of the scores of two halves of the examples.

    Attributes:
        spearman: mean over random halves.
        low, high: 2.5 % and 97.5 % quantiles over halves.
        reliability: of the scores on all examples, by the Spearman-Brown formula 2r/(1 + r).
        n_splits: how many times the examples were halved.
    """

    spearman: float
    low: float
    high: float
    reliability: float
    n_splits: int


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Relevance of every head on every example.

    Attributes:
        per_example: signed relevance, in ``unit``.
        method: how it was computed.
        positions: where heads deviated from their means.
        example_ids: the examples, in order.
        provenance: where it comes from.
        mlps: relevance of every MLP, if it was asked for.
        by_position: relevance of every head at every single position, if it was asked for.
            Positions are counted from the end of the prompt: the last index is its last token
            (the decision, but for masked models). Shorter prompts have zeros on the left.
        unit: of the relevance.
        whole: all examples were scored together (``greedy``, ``random``), so that each has the same
            score: there is no spread over examples, and no statistics over them.
    """

    per_example: Float[Tensor, "example layer head"]
    method: str
    positions: Positions
    example_ids: tuple[str, ...]
    provenance: Provenance
    mlps: Float[Tensor, "example layer"] | None = None
    by_position: Float[Tensor, "example pos layer head"] | None = None
    unit: str = "logits"
    whole: bool = False

    @property
    def mean(self) -> Float[Tensor, "layer head"]:
        """Mean over examples."""
        return self.per_example.double().mean(0)

    @property
    def passes(self) -> float | None:
        """Prompts that scoring took forward and backward through the model, as counted.

        A way back counts as two forward. ``None`` in files from before version 0.2.
        """
        counted = self.provenance.settings.get("passes", {})
        if "prompts" not in counted:
            return None
        both_ways = (counted["forward"] + 2 * counted["backward"]) / 3
        return float(both_ways * counted["prompts"])

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(self.per_example.shape[1])

    @property
    def n_heads(self) -> int:
        """Number of heads per layer."""
        return int(self.per_example.shape[2])

    # -- statistics ------------------------------------------------------------------------

    @cached_property
    def _resampled(self) -> Float[np.ndarray, "draw layer head"]:
        return _draws(self.per_example, self.provenance.seed)

    def _refuse_whole(self, what: str) -> None:
        if self.whole:
            raise InputError(
                f"{self.method} scores all examples together, so there is no {what} over "
                "examples: score by another method, such as cdt-linear or ablation."
            )

    def interval(self, level: float = 0.95) -> Float[Tensor, "bound layer head"]:
        """Percentile bootstrap interval of the mean over examples (1,000 draws).

        The baseline is fixed: it was estimated on these examples too, so the true spread is wider.

        Raises:
            InputError: if examples have no scores of their own (:attr:`whole`).
        """
        self._refuse_whole("interval")
        return _bounds(self._resampled, level)

    def bounds(self) -> Float[Tensor, "bound layer head"]:
        """The 95 % :meth:`interval`; NaN where there is none."""
        if self.whole:
            return torch.full((2, self.n_layers, self.n_heads), torch.nan, dtype=torch.float64)
        return self.interval()

    def mlp_interval(self, level: float = 0.95) -> Float[Tensor, "bound layer"]:
        """As :meth:`interval`, of MLPs.

        Raises:
            InputError: if MLPs were not scored.
        """
        return _bounds(_draws(self._scored_mlps, self.provenance.seed), level)

    @property
    def mlp_mean(self) -> Float[Tensor, " layer"]:
        """Mean relevance of every MLP over examples.

        Raises:
            InputError: if MLPs were not scored.
        """
        return self._scored_mlps.double().mean(0)

    @property
    def _scored_mlps(self) -> Float[Tensor, "example layer"]:
        if self.mlps is None:
            raise InputError("These scores are of heads only: call cl.relevance with mlps=True.")
        return self.mlps

    def stability(self, n_splits: int = 200) -> Stability:
        """Rank agreement (Spearman) of the scores of two halves of the discovery set.

        Both halves deviate from the same baseline, which was estimated on all of them, so the
        agreement of two independent discovery sets would be lower.

        Args:
            n_splits: how many times the examples are halved at random.

        Raises:
            InputError: if there are fewer than four examples, or these have no scores of their own
                (:attr:`whole`).
        """
        self._refuse_whole("stability")
        values = self.per_example.double().flatten(1).numpy()
        if len(values) < 4:
            raise InputError(
                f"Stability compares halves of the examples, but there are only {len(values)}: "
                "score at least four."
            )
        rng = np.random.default_rng(self.provenance.seed)
        half = len(values) // 2
        found = []
        for _ in range(n_splits):
            order = rng.permutation(len(values))
            first, second = values[order[:half]].mean(0), values[order[half:]].mean(0)
            found.append(float(spearmanr(first, second).statistic))
        low, high = np.quantile(found, [0.025, 0.975])
        r = float(np.mean(found))
        return Stability(r, float(low), float(high), 2 * r / (1 + r), n_splits)

    def significant(self, level: float = 0.95, control: Control = "each") -> Circuit:
        """Heads that support the task beyond chance.

        Args:
            level: confidence level.
            control: ``"each"`` takes every head by itself: its bootstrap interval lies above 0.
                ``"fdr"`` takes all together: among the heads returned no more than a share of
                1 − level is expected to be there by chance (t-tests over examples, two-sided;
                Benjamini-Hochberg).

        Raises:
            InputError: for a level that is not between 0 and 1, another control, or examples
                without scores of their own (:attr:`whole`).
        """
        self._refuse_whole("significance")
        check_level(level)
        check_choice("control", control, get_args(Control))
        if control == "fdr":
            p = ttest_1samp(self.per_example.double().flatten(1).numpy(), 0, axis=0).pvalue
            # A head without any effect has no variance, and a p-value that is not a number.
            rejected = false_discovery_control(np.nan_to_num(p, nan=1.0)) <= 1 - level
            chosen = torch.from_numpy(rejected) & (self.mean.flatten() > 0)
        else:
            chosen = self.interval(level)[0].flatten() > 0
        heads = self._heads(chosen.nonzero()[:, 0])
        return self._circuit(heads, f"relevance above 0 at level {level:g} ({control})")

    # -- rankings and circuits -------------------------------------------------------------

    def _heads(self, order: Tensor) -> list[Head]:
        return [Head(int(i) // self.n_heads, int(i) % self.n_heads) for i in order]

    def ranking(self) -> list[Head]:
        """All heads, the most supporting one first."""
        return self._heads(self.mean.flatten().argsort(descending=True, stable=True))

    def _count(self, size: int | float | np.integer) -> int:
        return head_count(size, self.n_layers * self.n_heads)

    def _circuit(self, heads: Sequence[Head], how: str) -> Circuit:
        return Circuit(
            tuple(heads),
            self.n_layers,
            self.n_heads,
            f"{self.method}: {how}",
            self.provenance,
        )

    def top(self, size: int | float) -> Circuit:
        """The heads with the largest relevance.

        Args:
            size: how many (an integer), or which share of all heads (a float; 0.05 is 5 %).
        """
        count = self._count(size)
        return self._circuit(self.ranking()[:count], f"top {count}")

    def near_zero(self, size: int | float, *, signed: bool = False) -> Circuit:
        """The heads whose relevance is nearest to zero: a control of the same size.

        Args:
            size: as in :meth:`top`.
            signed: by the magnitude of the mean relevance. By default it is the mean magnitude: a
                head that supports some examples and opposes others as much is not near zero.
        """
        count = self._count(size)
        values = self.mean.abs() if signed else self.per_example.double().abs().mean(0)
        order = values.flatten().argsort(stable=True)
        return self._circuit(self._heads(order[:count]), f"{count} nearest to zero")

    def random(self, size: int | float, seed: int = 0) -> Circuit:
        """Heads drawn at random from all heads: a control of the same size."""
        count = self._count(size)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.n_layers * self.n_heads, generator=generator)
        return self._circuit(self._heads(order[:count]), f"{count} at random (seed {seed})")

    def threshold(self, value: float) -> Circuit:
        """The heads with a relevance of at least ``value`` logits."""
        chosen = (self.mean.flatten() >= value).nonzero()[:, 0]
        return self._circuit(self._heads(chosen), f"relevance ≥ {value:g}")

    # -- files and tables ------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        meta = {
            "method": self.method,
            "positions": self.positions,
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
            "unit": self.unit,
            "whole": self.whole,
        }
        tensors = {"per_example": self.per_example, "mlps": self.mlps, "at": self.by_position}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        write_tensors(Path(path), _SCHEMA, kept, meta)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            return cls(
                per_example=tensors["per_example"],
                method=meta["method"],
                positions=meta["positions"],
                example_ids=tuple(meta["example_ids"]),
                provenance=Provenance.from_dict(meta["provenance"]),
                mlps=tensors.get("mlps"),
                by_position=tensors.get("at"),
                unit=meta.get("unit", "logits"),
                # Files of earlier versions do not say.
                whole=meta.get("whole", meta["method"] in ("greedy", "random")),
            )

    def to_frame(self) -> pd.DataFrame:
        """Return one row per head, the most supporting one first, with 95 % intervals.

        Where examples have no scores of their own, the intervals are NaN.
        """
        low, high = self.bounds()
        mean = self.mean
        return pd.DataFrame(
            [
                {
                    "head": str(head),
                    "layer": head.layer,
                    "index": head.index,
                    "relevance": float(mean[head.layer, head.index]),
                    "low": float(low[head.layer, head.index]),
                    "high": float(high[head.layer, head.index]),
                    "rank": rank,
                }
                for rank, head in enumerate(self.ranking(), start=1)
            ]
        )

    def mlp_frame(self) -> pd.DataFrame:
        """Return one row per MLP, the most supporting one first, with 95 % intervals.

        Raises:
            InputError: if MLPs were not scored.
        """
        low, high = self.mlp_interval()
        frame = pd.DataFrame(
            {
                "mlp": [f"m{layer}" for layer in range(self.n_layers)],
                "layer": range(self.n_layers),
                "relevance": self.mlp_mean.numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
            }
        )
        return frame.sort_values("relevance", ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        more = [", MLPs"] * (self.mlps is not None)
        more += [", single positions"] * (self.by_position is not None)
        return (
            f"HeadScores({self.method} on {self.provenance.task}: {self.n_layers} layers of "
            f"{self.n_heads} heads{''.join(more)}, {self.positions} positions, "
            f"{len(self.example_ids)} examples)"
        )

    def _repr_html_(self) -> str:
        title = html.escape(f"{self.method} on {self.provenance.task}")
        table = self.to_frame().head(10).to_html(index=False, float_format="{:.4f}".format)
        return f"<p><b>HeadScores</b> {title}, {len(self.example_ids)} examples</p>{table}"


def head_count(size: int | float | np.integer, total: int) -> int:
    """How many of ``total`` heads an integer (a count) or a float (a share) asks for.

    Raises:
        InputError: if the model has not as many, or the share is not between 0 and 1.
    """
    if isinstance(size, bool | np.bool_) or not isinstance(size, int | float | np.number):
        raise InputError(f"A size must be a number of heads or a share of them, but is {size!r}.")
    if isinstance(size, int | np.integer):
        count = int(size)
    elif 0 < size <= 1:
        count = max(1, round(size * total))
    else:
        raise InputError(f"A share of heads must be between 0 and 1, but {size} was given.")
    if not 0 <= count <= total:
        raise InputError(f"{count} heads were asked for, but the model has {total}.")
    return count


def _draws(values: Float[Tensor, "example *node"], seed: int) -> np.ndarray:
    """Means over examples drawn with replacement, ``draw *node``."""
    drawn = resampled_means(values.double().flatten(1).T.numpy(), seed)
    return drawn.reshape(-1, *values.shape[1:])


def _bounds(drawn: np.ndarray, level: float) -> Tensor:
    bounds = percentiles(drawn.reshape(len(drawn), -1), level)
    return torch.from_numpy(bounds.reshape(2, *drawn.shape[1:]))
