"""Relevance of every head, by a named method.

Relevance is signed: positive means that the head's deviation from its mean supports the right
label. The unit is logits of task margin. Every method scores the same examples against the same
baseline, so that rankings can be compared.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.batch import Batch, Positions
from circuitlens.cdt import RULES, RuleSet, relevance_by_difference, relevance_by_gradient
from circuitlens.circuit import Circuit
from circuitlens.errors import CircuitLensError, InputError
from circuitlens.geometry import Head
from circuitlens.model import HookedModel
from circuitlens.progress import progress
from circuitlens.provenance import Provenance
from circuitlens.storage import read_tensors, write_tensors
from circuitlens.tasks import Example, Task

__all__ = ["METHODS", "HeadScores", "relevance"]

_SCHEMA = "circuitlens.scores/1"

METHODS: dict[str, str] = {
    "cdt": "patterns and norm scales frozen, activations by difference",
    "cdt-linear": "patterns and norm scales frozen, activations by secant, one backward pass",
    "cdt-live": "patterns frozen, norm scales live, activations by difference",
    "attribution": "gradient × deviation from the mean, nothing frozen",
    "ablation": "exact mean ablation, one head at a time",
    "random": "random numbers, as a control",
}


@dataclass(frozen=True)
class HeadScores:
    """Relevance of every head on every example.

    Attributes:
        per_example: signed relevance in logits of task margin.
        method: how it was computed.
        positions: where heads deviated from their means.
        example_ids: the examples, in order.
        provenance: where it comes from.
    """

    per_example: Float[Tensor, "example layer head"]
    method: str
    positions: Positions
    example_ids: tuple[str, ...]
    provenance: Provenance

    @property
    def mean(self) -> Float[Tensor, "layer head"]:
        """Mean over examples."""
        return self.per_example.double().mean(0)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(self.per_example.shape[1])

    @property
    def n_heads(self) -> int:
        """Number of heads a layer."""
        return int(self.per_example.shape[2])

    @cached_property
    def _resampled(self) -> Float[np.ndarray, "draw layer head"]:
        rng = np.random.default_rng(self.provenance.seed)
        values = self.per_example.double().numpy()
        n = len(values)
        # Weights instead of index lists: one matrix product makes all draws.
        weights = rng.multinomial(n, np.full(n, 1 / n), size=1000) / n
        drawn: np.ndarray = np.einsum("de,elh->dlh", weights, values)
        return drawn

    def interval(self, level: float = 0.95) -> Float[Tensor, "bound layer head"]:
        """Percentile bootstrap interval of the mean over examples (1,000 draws)."""
        if not 0 < level < 1:
            raise InputError(f"The level of an interval lies between 0 and 1, but is {level}.")
        tail = (1 - level) / 2
        bounds = np.quantile(self._resampled, [tail, 1 - tail], axis=0)
        return torch.from_numpy(bounds)

    # -- rankings and circuits -------------------------------------------------------------

    def _heads(self, order: Tensor) -> list[Head]:
        return [Head(int(i) // self.n_heads, int(i) % self.n_heads) for i in order]

    def ranking(self) -> list[Head]:
        """All heads, the most supporting one first."""
        return self._heads(self.mean.flatten().argsort(descending=True, stable=True))

    def _count(self, size: int | float | np.integer) -> int:
        total = self.n_layers * self.n_heads
        if isinstance(size, int | np.integer):
            count = int(size)
        elif 0 < size <= 1:
            count = max(1, round(size * total))
        else:
            raise InputError(f"A share of heads lies between 0 and 1, but {size} was given.")
        if not 0 <= count <= total:
            raise InputError(f"{count} heads were asked for, but the model has {total}.")
        return count

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

    def near_zero(self, size: int | float) -> Circuit:
        """The heads whose relevance is nearest to zero: a control of the same size."""
        count = self._count(size)
        order = self.mean.abs().flatten().argsort(stable=True)
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
        }
        write_tensors(Path(path), _SCHEMA, {"per_example": self.per_example}, meta)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what :meth:`save` wrote."""
        tensors, meta = read_tensors(Path(path), _SCHEMA)
        return cls(
            per_example=tensors["per_example"],
            method=meta["method"],
            positions=meta["positions"],
            example_ids=tuple(meta["example_ids"]),
            provenance=Provenance.from_dict(meta["provenance"]),
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row a head, the most supporting one first, with 95 % intervals."""
        low, high = self.interval()
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

    def _repr_html_(self) -> str:
        title = html.escape(f"{self.method} on {self.provenance.task}")
        table = self.to_frame().head(10).to_html(index=False, float_format="{:.4f}".format)
        return f"<p><b>HeadScores</b> {title}, {len(self.example_ids)} examples</p>{table}"


def relevance(
    model: HookedModel,
    task: Task,
    baseline: MeanBaseline,
    *,
    method: str | RuleSet = "cdt-linear",
    max_examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
) -> HeadScores:
    """Score every head of a model on a task.

    Args:
        model: competent in the task.
        task: the task that the baseline was taken on.
        baseline: means of the heads; scores are taken on its (correctly answered) examples, at
            its positions.
        method: one of :data:`METHODS`, or a rule set of your own. The default found circuits at
            least as faithful as ``cdt`` on the models we measured, at a tenth of its cost.
        max_examples: use a random subset of this size.
        batch_size: examples per forward pass; the scores do not depend on it.
        seed: for the subset, the ``random`` method and bootstrap intervals.
        quiet: no progress bar.

    Raises:
        InputError: for an unknown method, or a baseline of another model or task.
    """
    score = _scorer(model, baseline, method)
    baseline.check_model(model)
    by_id = {example.id: example for pool in ("pool_a",) for example in task[pool]}
    if unknown := [i for i in baseline.example_ids if i not in by_id]:
        raise InputError(
            f"The baseline was taken on example {unknown[0]!r}, which is not in pool A of "
            f"{task.name}/{task.language}: take the baseline on this task."
        )
    if max_examples is not None and max_examples < 1:
        raise InputError(f"max_examples must be positive, but is {max_examples}.")
    generator = torch.Generator().manual_seed(seed)
    ids = list(baseline.example_ids)
    if max_examples is not None and max_examples < len(ids):
        chosen = torch.randperm(len(ids), generator=generator)[:max_examples].sort().values
        ids = [ids[i] for i in chosen]
    examples: list[Example] = [by_id[i] for i in ids]
    encoded = task.encode(model, examples)
    name = method if isinstance(method, str) else method.name
    g = model.geometry
    found = torch.empty(len(ids), g.n_layers, g.n_heads, dtype=torch.float32)
    if score is None:
        found[:] = torch.randn(g.n_layers, g.n_heads, generator=generator)
    else:
        batches = encoded.batches(batch_size, model.device)
        for index, batch in progress(
            batches, f"Relevance ({name})", quiet=quiet, total=encoded.n_batches(batch_size)
        ):
            found[index] = score(batch).detach().float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise CircuitLensError(
            f"{name} gave scores of {model.name} that are not finite: the activations overflow in "
            f"{model.dtype}; load the model with dtype float32."
        )
    settings = {"method": name, "positions": baseline.positions, "max_examples": max_examples}
    return HeadScores(
        per_example=found,
        method=name,
        positions=baseline.positions,
        example_ids=tuple(ids),
        provenance=Provenance(
            model.name,
            baseline.provenance.model_fingerprint,
            f"{task.name}/{task.language}",
            task.fingerprint(),
            seed,
            settings,
        ),
    )


def _scorer(
    model: HookedModel, baseline: MeanBaseline, method: str | RuleSet
) -> Callable[[Batch], Float[Tensor, "batch layer head"]] | None:
    """Find the function that scores a batch; ``None`` for random scores."""
    if isinstance(method, str) and method not in METHODS:
        raise InputError(f"There is no method {method!r}; known are {', '.join(METHODS)}.")
    if method == "random":
        return None
    rules = RULES[method] if isinstance(method, str) else method
    mean = baseline.mean.to(model.device)
    engine = relevance_by_difference if rules.activation == "difference" else relevance_by_gradient
    return lambda batch: engine(model, batch, mean, rules, positions=baseline.positions)
