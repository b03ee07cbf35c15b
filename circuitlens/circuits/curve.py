"""Faithfulness: does the circuit alone do the task?

Keep the heads of a circuit C and set all others to their means (mean ablation), at the positions
of the baseline. With m the mean task margin,

    f(C) = (m(C) − m(∅)) / (m(all) − m(∅))

is the share of the margin, beyond what the heads' means give, that the circuit alone recovers.
Measured on examples that discovery did not see, for circuits of growing size, alongside

* random circuits of the same size, drawn from all heads, and drawn with as many heads in every
  layer as the circuit has there;
* the model without the circuit: its heads are ablated and all others kept. The f that is left is
  what the other heads can do without it, so a complete circuit leaves little (the completeness
  of Wang et al. 2023, arXiv 2211.00593, with all of the circuit taken away).
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.integrate import trapezoid

from circuitlens.errors import InputError, check_choice
from circuitlens.node_circuit import NodeKind
from circuitlens.utils.bootstrap import check_level, percentiles, resampled_means
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = [
    "LEAST",
    "FaithfulnessCurve",
    "caveat_of",
    "caveat_of_draws",
    "normalised",
    "note",
    "ratio_interval",
]

_SCHEMA = "circuitlens.faithfulness/2"

# Smaller differences of margins, in logits, are rounding.
LEAST = 1e-6
_METRICS = ("margin", "accuracy", "probability")
_KINDS = ("", "random_", "layer_matched_", "without_")


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve:
    """Task performance of circuits of growing size.

    Each is measured by the task margin in logits, by accuracy, and by the probability of the
    right label, which is the softmax over the label tokens only; means over examples.

    Attributes:
        sizes: numbers of heads kept, from none to all.
        margin, accuracy, probability: of the top heads, for each size.
        random_margin, random_accuracy, random_probability: of random circuits of the same sizes.
        layer_matched_margin, layer_matched_accuracy, layer_matched_probability: of random circuits
            with as many heads in every layer as the top heads have there.
        without_margin, without_accuracy, without_probability: of the model without the top heads.
        example_margin: margins of the top heads on each example.
        n_heads: nodes of the whole model, which are heads unless :attr:`nodes` says otherwise.
        method: the scorer whose ranking was followed.
        example_ids: the examples, none of which discovery saw.
        provenance: where it comes from.
        nodes: what is kept and ablated, ``"heads"``, ``"heads+mlps"``, ``"heads@positions"`` or
            ``"neurons"``.
    """

    sizes: tuple[int, ...]
    margin: Float[np.ndarray, " size"]
    accuracy: Float[np.ndarray, " size"]
    probability: Float[np.ndarray, " size"]
    random_margin: Float[np.ndarray, "draw size"]
    random_accuracy: Float[np.ndarray, "draw size"]
    random_probability: Float[np.ndarray, "draw size"]
    layer_matched_margin: Float[np.ndarray, "draw size"]
    layer_matched_accuracy: Float[np.ndarray, "draw size"]
    layer_matched_probability: Float[np.ndarray, "draw size"]
    without_margin: Float[np.ndarray, " size"]
    without_accuracy: Float[np.ndarray, " size"]
    without_probability: Float[np.ndarray, " size"]
    example_margin: Float[np.ndarray, "size example"]
    n_heads: int
    method: str
    example_ids: tuple[str, ...]
    provenance: Provenance
    nodes: NodeKind = "heads"

    @property
    def shares(self) -> Float[np.ndarray, " size"]:
        """Shares of all heads that were kept, from 0 to 1."""
        return np.array(self.sizes) / self.n_heads

    def _normalise(self, values: np.ndarray) -> np.ndarray:
        return normalised(values, self.margin[0], self.margin[-1])

    @property
    def faithfulness(self) -> Float[np.ndarray, " size"]:
        """Normalised margin f of the top heads, 0 for no heads and 1 for all.

        NaN where f has no meaning; :attr:`caveat` explains why.
        """
        return self._normalise(self.margin)

    @property
    def caveat(self) -> str | None:
        """Why f, or its interval, has no meaning on these examples; ``None`` where it has."""
        return caveat_of(self.margin[0], self.margin[-1]) or caveat_of_draws(self._denominators)

    @property
    def random_faithfulness(self) -> Float[np.ndarray, "draw size"]:
        """Normalised margin f of the random circuits."""
        return self._normalise(self.random_margin)

    @property
    def layer_matched_faithfulness(self) -> Float[np.ndarray, "draw size"]:
        """Normalised margin f of the random circuits that are matched layer by layer."""
        return self._normalise(self.layer_matched_margin)

    @property
    def completeness(self) -> Float[np.ndarray, " size"]:
        """Normalised margin f of the model without the top heads; low if they are complete."""
        return self._normalise(self.without_margin)

    # -- summaries -------------------------------------------------------------------------

    @cached_property
    def _drawn(self) -> Float[np.ndarray, "draw size"]:
        return resampled_means(self.example_margin, self.provenance.seed)

    @property
    def _denominators(self) -> Float[np.ndarray, " draw"]:
        return np.asarray(self._drawn[:, -1] - self._drawn[:, 0])

    def interval(self, level: float = 0.95) -> Float[np.ndarray, "bound size"]:
        """Percentile bootstrap interval of f over examples (1,000 draws).

        A draw of examples is the same for the circuit and for the two margins that normalise f,
        so the ends, 0 and 1 by definition, have no width. NaN where f has no meaning, or in some
        draw the whole model is no better than the one without heads: then f has no bounds.

        Raises:
            InputError: if ``level`` is not between 0 and 1.
        """
        return ratio_interval(self._drawn - self._drawn[:, :1], self._denominators, level)

    def area(self, metric: str = "faithfulness", scale: str = "linear") -> float:
        """Average of the curve of the top heads over circuit sizes, by the trapezoid rule.

        Args:
            metric: ``"faithfulness"``, ``"accuracy"`` or ``"probability"``.
            scale: ``"linear"`` integrates over the actual share of heads from 0 (no heads) to 1.
                ``"log"`` integrates over log10 of the share, from the smallest circuit that has
                heads to 1, and divides by the length of that range; small circuits weigh more.

        Raises:
            InputError: for another metric or scale.
        """
        check_choice("metric", metric, ("faithfulness", "accuracy", "probability"))
        check_choice("scale", scale, ("linear", "log"))
        y = getattr(self, metric)
        if scale == "linear":
            return float(trapezoid(y, self.shares))
        x, y = np.log10(self.shares[1:]), y[1:]
        # With all heads as the only circuit the range has no length, and its one value is left.
        return float(trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the integral of f over the share of heads; high is good.

        MIB-style (Mueller et al. 2025, arXiv 2504.13151), with mean ablation of heads instead of
        the benchmark's counterfactual patching of edges, so not comparable with its leaderboard.
        (Here the integral begins at no heads, there at the smallest circuit.)
        """
        return self.area()

    @property
    def cmd(self) -> float:
        """Circuit–model distance: the integral of |1 − f| over the share of heads; low is good.

        MIB-style (Mueller et al. 2025, arXiv 2504.13151), with mean ablation of heads instead of
        the benchmark's counterfactual patching of edges, so not comparable with its leaderboard.
        (Here the integral begins at no heads, there at the smallest circuit.)
        """
        return float(trapezoid(np.abs(1 - self.faithfulness), self.shares))

    def smallest(self, f: float = 0.8) -> int:
        """The smallest of the sizes whose circuit keeps a share ``f`` of the margin.

        Raises:
            InputError: if none does, or f has no meaning here (:attr:`caveat`).
        """
        if self.caveat:
            raise InputError(self.caveat)
        reached = [n for n, found in zip(self.sizes, self.faithfulness, strict=True) if found >= f]
        if not reached:
            raise InputError(f"No circuit of this curve keeps f = {f:g}: ask for less.")
        return reached[0]

    def at(self, size: int) -> dict[str, float]:
        """Return all columns of :meth:`to_frame` but ``heads`` at one of the sizes.

        Raises:
            InputError: if the curve does not have that size.
        """
        if size not in self.sizes:
            raise InputError(f"The curve has no size {size}; it has {list(self.sizes)}.")
        row = self.to_frame().drop(columns="heads").iloc[self.sizes.index(size)]
        return {str(name): float(value) for name, value in row.items()}

    def to_frame(self) -> pd.DataFrame:
        """Return one row per size.

        Columns: ``heads`` and ``share``; ``margin``, ``faithfulness`` with its 95 % interval
        (``_low``, ``_high``), ``accuracy`` and ``probability`` of the top heads; the last three
        of random circuits as mean, lowest and highest value (``random_…``, ``_min``, ``_max``) and
        of layer-matched ones as mean (``layer_matched_…``); of the model without the top heads
        ``completeness``, ``without_accuracy`` and ``without_probability``. Without random
        circuits their columns are NaN.
        """
        low, high = self.interval()
        columns: dict[str, Any] = {
            "heads": self.sizes,
            "share": self.shares,
            "margin": self.margin,
            "faithfulness": self.faithfulness,
            "faithfulness_low": low,
            "faithfulness_high": high,
            "accuracy": self.accuracy,
            "probability": self.probability,
        }
        for metric in ("faithfulness", "accuracy", "probability"):
            draws = _or_nan(getattr(self, f"random_{metric}"))
            columns[f"random_{metric}"] = draws.mean(0)
            columns[f"random_{metric}_min"] = draws.min(0)
            columns[f"random_{metric}_max"] = draws.max(0)
        for metric in ("faithfulness", "accuracy", "probability"):
            draws = _or_nan(getattr(self, f"layer_matched_{metric}"))
            columns[f"layer_matched_{metric}"] = draws.mean(0)
        columns["completeness"] = self.completeness
        columns["without_accuracy"] = self.without_accuracy
        columns["without_probability"] = self.without_probability
        return pd.DataFrame(columns)

    # -- files -----------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        names = [kind + metric for kind in _KINDS for metric in _METRICS] + ["example_margin"]
        meta: dict[str, Any] = {
            "sizes": list(self.sizes),
            "n_heads": self.n_heads,
            "nodes": self.nodes,
            "method": self.method,
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
        }
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in names}
        write_tensors(Path(path), _SCHEMA, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> FaithfulnessCurve:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            return cls(
                sizes=tuple(meta["sizes"]),
                n_heads=meta["n_heads"],
                nodes=meta.get("nodes", "heads"),
                method=meta["method"],
                example_ids=tuple(meta["example_ids"]),
                provenance=Provenance.from_dict(meta["provenance"]),
                **{name: tensor.numpy() for name, tensor in tensors.items()},
            )

    def __repr__(self) -> str:
        return (
            f"FaithfulnessCurve({self.method} on {self.provenance.task}: {len(self.sizes)} sizes "
            f"up to {self.n_heads} {self.nodes}, {len(self.example_ids)} examples, "
            f"{len(self.random_margin)} random circuits of each kind and size)"
        )

    def _repr_html_(self) -> str:
        shown = ["heads", "share", "faithfulness", "faithfulness_low", "faithfulness_high"]
        shown += ["accuracy", "probability", "random_faithfulness", "layer_matched_faithfulness"]
        table = self.to_frame()[[*shown, "completeness"]]
        return (
            f"<p><b>FaithfulnessCurve</b> of {html.escape(self.method)} on "
            f"{html.escape(self.provenance.task)}: {len(self.example_ids)} examples, "
            f"{len(self.random_margin)} random circuits of each kind and size; CPR {self.cpr:.3f}, "
            f"CMD {self.cmd:.3f}</p>{note(self.caveat)}"
            f"{table.to_html(index=False, float_format='{:.3f}'.format)}"
        )


def normalised(values: np.ndarray, empty: float, full: float) -> np.ndarray:
    """Scale margins so that the model without any head has 0 and the whole model 1.

    Where the whole model is no better there is nothing to be faithful to, and all is NaN: a curve
    from 0 to 1 would look like one of a circuit while the heads hurt.
    """
    if full - empty < LEAST:
        return np.full_like(values, np.nan, dtype=float)
    return np.asarray((values - empty) / (full - empty))


def caveat_of(empty: float, full: float) -> str | None:
    """Why f has no meaning between these margins, if it has none."""
    if full - empty >= LEAST:
        return None
    what = "hurt" if empty - full >= LEAST else "do not carry the task"
    return (
        f"The heads {what} on these examples (margin {full:.3f} with all heads, {empty:.3f} with "
        "all at their means), so faithfulness f has no meaning and is NaN: look at margins and "
        "accuracy instead."
    )


def caveat_of_draws(denominators: Float[np.ndarray, " draw"]) -> str | None:
    """Why an interval of f has no bounds, if it has none."""
    bad = int((denominators < LEAST).sum())
    if not bad:
        return None
    return (
        f"In {bad} of {len(denominators)} bootstrap draws the whole model is no better than the "
        "one without heads, so the interval of f has no bounds (NaN): measure on more examples."
    )


def ratio_interval(
    numerators: Float[np.ndarray, "draw row"],
    denominators: Float[np.ndarray, " draw"],
    level: float,
) -> Float[np.ndarray, "bound row"]:
    """Percentile interval of ratios; NaN if a denominator reaches 0.

    Raises:
        InputError: if ``level`` is not between 0 and 1.
    """
    check_level(level)
    if (denominators < LEAST).any():
        return np.full((2, numerators.shape[1]), np.nan)
    return percentiles(numerators / denominators[:, None], level)


def note(caveat: str | None) -> str:
    """A paragraph of HTML for a caveat, if there is one."""
    return f"<p>{html.escape(caveat)}</p>" if caveat else ""


def _or_nan(draws: Float[np.ndarray, "draw size"]) -> Float[np.ndarray, "row size"]:
    return draws if len(draws) else np.full((1, draws.shape[1]), np.nan)
