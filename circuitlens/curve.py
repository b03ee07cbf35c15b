"""Faithfulness: does the circuit alone do the task?

Keep the heads of a circuit C and set all others to their means (mean ablation), at the positions
of the baseline. With m the mean task margin,

    f(C) = (m(C) − m(∅)) / (m(all) − m(∅))

is the share of the margin, beyond what the heads' means give, that the circuit alone brings.
Measured on examples that discovery did not see, for circuits of growing size, beside circuits of
the same size drawn at random.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.batch import Batch, label_logits, task_margin
from circuitlens.errors import InputError
from circuitlens.geometry import Head
from circuitlens.model import Hook, HookedModel
from circuitlens.progress import progress
from circuitlens.provenance import Provenance
from circuitlens.scores import HeadScores
from circuitlens.storage import read_tensors, write_tensors
from circuitlens.tasks import Example, Task

__all__ = ["FaithfulnessCurve", "ablated_logits", "default_sizes", "faithfulness"]

_SCHEMA = "circuitlens.faithfulness/1"
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Task performance of circuits of growing size.

    Attributes:
        sizes: numbers of heads kept, from none to all.
        margin, accuracy: of the top heads, for each size.
        random_margin, random_accuracy: of random circuits of the same sizes.
        n_heads: heads of the whole model.
        method: the scorer whose ranking was followed.
        example_ids: the examples, none of which discovery saw.
        provenance: where it comes from.
    """

    sizes: tuple[int, ...]
    margin: Float[np.ndarray, " size"]
    accuracy: Float[np.ndarray, " size"]
    random_margin: Float[np.ndarray, "draw size"]
    random_accuracy: Float[np.ndarray, "draw size"]
    n_heads: int
    method: str
    example_ids: tuple[str, ...]
    provenance: Provenance

    def _normalise(self, margin: np.ndarray) -> np.ndarray:
        empty, full = self.margin[0], self.margin[-1]
        if abs(full - empty) < 1e-6:
            raise InputError(
                "Ablating all heads leaves the margin as it is, so faithfulness is undefined: "
                "the heads do not carry this task."
            )
        return np.asarray((margin - empty) / (full - empty))

    @property
    def faithfulness(self) -> Float[np.ndarray, " size"]:
        """Normalised margin f of the top heads, 0 for no heads and 1 for all."""
        return self._normalise(self.margin)

    @property
    def random_faithfulness(self) -> Float[np.ndarray, "draw size"]:
        """Normalised margin f of the random circuits."""
        return self._normalise(self.random_margin)

    def at(self, size: int) -> dict[str, float]:
        """Return f, accuracy and the random circuits' means at one of the sizes."""
        if size not in self.sizes:
            raise InputError(f"The curve has no size {size}; it has {list(self.sizes)}.")
        i = self.sizes.index(size)
        return {
            "faithfulness": float(self.faithfulness[i]),
            "accuracy": float(self.accuracy[i]),
            "random_faithfulness": float(self.random_faithfulness[:, i].mean()),
            "random_accuracy": float(self.random_accuracy[:, i].mean()),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row a size; random circuits as mean, least and largest value."""
        rf, ra = self.random_faithfulness, self.random_accuracy
        return pd.DataFrame(
            {
                "heads": self.sizes,
                "share": np.array(self.sizes) / self.n_heads,
                "margin": self.margin,
                "faithfulness": self.faithfulness,
                "accuracy": self.accuracy,
                "random_faithfulness": rf.mean(0),
                "random_faithfulness_min": rf.min(0),
                "random_faithfulness_max": rf.max(0),
                "random_accuracy": ra.mean(0),
                "random_accuracy_min": ra.min(0),
                "random_accuracy_max": ra.max(0),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        names = ("margin", "accuracy", "random_margin", "random_accuracy")
        meta: dict[str, Any] = {
            "sizes": list(self.sizes),
            "n_heads": self.n_heads,
            "method": self.method,
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
        }
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in names}
        write_tensors(Path(path), _SCHEMA, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> FaithfulnessCurve:
        """Read what :meth:`save` wrote."""
        tensors, meta = read_tensors(Path(path), _SCHEMA)
        return cls(
            sizes=tuple(meta["sizes"]),
            n_heads=meta["n_heads"],
            method=meta["method"],
            example_ids=tuple(meta["example_ids"]),
            provenance=Provenance.from_dict(meta["provenance"]),
            **{name: tensor.numpy() for name, tensor in tensors.items()},
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return f"<p><b>FaithfulnessCurve</b> of {html.escape(self.method)}</p>{table}"


def default_sizes(n_heads: int) -> list[int]:
    """Circuit sizes of the default curve: about a dozen, from none to all heads."""
    return sorted({round(share * n_heads) for share in _SHARES})


def ablated_logits(
    model: HookedModel,
    batch: Batch,
    keep: Bool[Tensor, "layer head"],
    baseline: MeanBaseline,
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the decision position with every head outside ``keep`` at its mean."""
    where = batch.mask(baseline.positions)[:, :, None]
    hooks: dict[str, Hook] = {}
    for layer in range(model.geometry.n_layers):
        if bool(keep[layer].all()):
            continue
        away = where & ~keep[layer].to(model.device)
        mean = baseline.mean[layer].to(model.device)

        def ablate(z: Tensor, away: Tensor = away, mean: Tensor = mean) -> Tensor:
            return torch.where(away[..., None], mean.to(z), z)

        hooks[model.z_hook(layer)] = ablate
    return model.logits(batch, hooks)


@torch.no_grad()
def faithfulness(
    model: HookedModel,
    task: Task,
    scores: HeadScores,
    baseline: MeanBaseline,
    *,
    sizes: Sequence[int] | None = None,
    n_random: int = 10,
    examples: Sequence[Example] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    quiet: bool = False,
) -> FaithfulnessCurve:
    """Measure circuits of growing size, all other heads mean-ablated.

    Args:
        model: the model that was scored.
        task: gives the held-out examples (pool B and validation of the source language).
        scores: their ranking is followed, the most supporting head first.
        baseline: the means that replace the ablated heads.
        sizes: numbers of heads to keep; no head and all heads are always included.
        n_random: random circuits for each size.
        examples: use these instead of the held-out ones.
        batch_size: examples per forward pass.
        seed: for the random circuits.
        quiet: no progress bar.

    Raises:
        InputError: if an example was used for discovery, or the baseline is of another model.
    """
    baseline.check_model(model)
    g = model.geometry
    total = len(g)
    wanted = sorted({0, total, *(default_sizes(total) if sizes is None else sizes)})
    if wanted[0] < 0 or wanted[-1] > total:
        raise InputError(f"Circuit sizes must lie between 0 and {total}, but are {wanted}.")
    examples = task.held_out if examples is None else tuple(examples)
    _refuse_seen(examples, {*scores.example_ids, *baseline.example_ids})
    encoded = task.encode(model, examples)
    generator = torch.Generator().manual_seed(seed)
    rankings = [scores.ranking()]
    heads = list(g)
    for _ in range(n_random):
        order = torch.randperm(total, generator=generator)
        rankings.append([heads[i] for i in order])

    # No heads and all heads are the same circuit whatever the ranking.
    jobs = [(0, size) for size in wanted]
    jobs += [(r, size) for r in range(1, n_random + 1) for size in wanted[1:-1]]
    margin = np.empty((n_random + 1, len(wanted)))
    accuracy = np.empty_like(margin)
    for r, size in progress(jobs, "Faithfulness", quiet=quiet, total=len(jobs)):
        keep = _grid(rankings[r][:size], g.n_layers, g.n_heads)
        column = wanted.index(size)
        margins, right = 0.0, 0
        for _, batch in encoded.batches(batch_size, model.device):
            logits = ablated_logits(model, batch, keep, baseline)
            margins += float(task_margin(logits, batch).double().sum())
            right += int((label_logits(logits, batch).argmax(1) == batch.gold).sum())
        margin[r, column] = margins / len(encoded)
        accuracy[r, column] = right / len(encoded)
    for values in (margin, accuracy):
        values[1:, [0, -1]] = values[0, [0, -1]]
    settings = {"n_random": n_random, "positions": baseline.positions, "scores": scores.method}
    return FaithfulnessCurve(
        sizes=tuple(wanted),
        margin=margin[0],
        accuracy=accuracy[0],
        random_margin=margin[1:],
        random_accuracy=accuracy[1:],
        n_heads=total,
        method=scores.method,
        example_ids=encoded.ids,
        provenance=Provenance(
            model.name,
            baseline.provenance.model_fingerprint,
            f"{task.name}/{task.language}",
            task.fingerprint(),
            seed,
            settings,
        ),
    )


def _refuse_seen(examples: Sequence[Example], seen: Collection[str]) -> None:
    if both := [e.id for e in examples if e.id in seen]:
        raise InputError(
            f"Example {both[0]!r} was used for discovery, so faithfulness measured on it would "
            "be too good: use other examples."
        )


def _grid(heads: Sequence[Head], n_layers: int, n_heads: int) -> Bool[Tensor, "layer head"]:
    grid = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    for head in heads:
        grid[head.layer, head.index] = True
    return grid
