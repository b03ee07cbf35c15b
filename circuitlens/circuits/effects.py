"""What ablating a single head does to the whole model: the check of an attribution.

Relevance is an attribution: what β of a head adds to the margin where patterns and norms are held
or linearised. The *effect* of a head is what the margin loses when its output is set to its mean
and everything after it reacts. The two can disagree, mostly where later heads make up for what
is missing; then a head may be relevant and not needed.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.ablation import circuit_label_logits, head_mask
from circuitlens.circuit import Circuit
from circuitlens.errors import BASELINE, CIRCUIT, MODEL, TASK, InputError, check_types
from circuitlens.models.batch import margin
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.score_heads import discovery_examples
from circuitlens.tasks import Encoded, Task
from circuitlens.utils.bootstrap import percentiles, resampled_means
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = ["AblatedSingly", "HeadEffects", "ablated_singly", "head_effects"]

_SCHEMA = "circuitlens.effects/1"


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects:
    """What the margin loses with each of some heads, on every example.

    Attributes:
        heads: the heads.
        per_example: margin of the whole model minus margin with that head at its mean, in logits.
        example_ids: the examples.
        provenance: where it comes from.
    """

    heads: tuple[Head, ...]
    per_example: Float[Tensor, "example head"]
    example_ids: tuple[str, ...]
    provenance: Provenance

    @property
    def mean(self) -> Float[np.ndarray, " head"]:
        """Mean over examples."""
        return self.per_example.double().mean(0).numpy()

    def interval(self, level: float = 0.95) -> Float[np.ndarray, "bound head"]:
        """Percentile bootstrap interval of the mean over examples (1,000 draws).

        Raises:
            InputError: if ``level`` is not between 0 and 1.
        """
        return percentiles(self._resampled, level)

    @cached_property
    def _resampled(self) -> Float[np.ndarray, "draw head"]:
        return resampled_means(self.per_example.double().numpy().T, self.provenance.seed)

    def of(self, head: Head) -> tuple[float, float, float] | None:
        """Effect of a head with its 95 % interval, or ``None`` if it was not measured."""
        if head not in self.heads:
            return None
        place = self.heads.index(head)
        low, high = self.interval()
        return float(self.mean[place]), float(low[place]), float(high[place])

    def contradicted(self) -> list[Head]:
        """Heads whose ablation does not lower the margin: the 95 % interval reaches 0 or below."""
        low, _ = self.interval()
        return [head for head, bound in zip(self.heads, low, strict=True) if bound <= 0]

    def to_frame(self, scores: HeadScores | None = None) -> pd.DataFrame:
        """Return one row per head with its effect, the largest first.

        Args:
            scores: adds their ``relevance``.
        """
        low, high = self.interval()
        frame = pd.DataFrame(
            {
                "head": list(map(str, self.heads)),
                "effect": self.mean,
                "effect_low": low,
                "effect_high": high,
                "contradicted": low <= 0,
            }
        )
        if scores is not None:
            of_scores = [float(scores.mean[h.layer, h.index]) for h in self.heads]
            frame.insert(1, "relevance", of_scores)
        return frame.sort_values("effect", ascending=False, kind="stable", ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        meta: dict[str, Any] = {
            "heads": list(map(str, self.heads)),
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
        }
        write_tensors(Path(path), _SCHEMA, {"per_example": self.per_example}, meta)

    @classmethod
    def load(cls, path: str | Path) -> HeadEffects:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            return cls(
                tuple(map(Head.parse, meta["heads"])),
                tensors["per_example"],
                tuple(meta["example_ids"]),
                Provenance.from_dict(meta["provenance"]),
            )

    def __repr__(self) -> str:
        return (
            f"HeadEffects({self.provenance.task}: {len(self.heads)} heads ablated one at a time, "
            f"{len(self.example_ids)} examples)"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return f"<p><b>HeadEffects</b> on {html.escape(self.provenance.task)}</p>{table}"


def head_effects(
    model: HookedModel,
    task: Task,
    heads: Circuit | Iterable[Head],
    baseline: MeanBaseline,
    *,
    max_examples: int | None = None,
    batch_size: int = 32,
    rows: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> HeadEffects:
    """Ablate each of some heads by itself, exactly: one run per head, from its layer on.

    Args:
        model: the model.
        task: the task that the baseline was taken on.
        heads: a circuit, or any heads.
        baseline: the means that the heads are set to, and the positions where they are.
        max_examples: a random subset of this size of the examples that discovery scores.
        batch_size: examples that are padded to one width and share a clean run.
        rows: prompts that go through the model at once; halves when memory runs out.
        seed: for the subset and the bootstrap.
        quiet: no progress bar.

    Raises:
        InputError: if there are no heads, or circuit or baseline are of another model or task.
    """
    found = ablated_singly(
        "head_effects",
        model,
        task,
        heads,
        baseline,
        max_examples=max_examples,
        batch_size=batch_size,
        rows=rows,
        seed=seed,
        quiet=quiet,
    )
    margins = margin(found.labels, torch.tensor(found.encoded.gold))
    settings = {"positions": baseline.positions, "pooling": baseline.pooling}
    return HeadEffects(
        found.circuit.heads,
        (margins[:1] - margins[1:]).T.contiguous(),
        found.encoded.ids,
        baseline.provenance_of(model, task, seed, settings),
    )


@dataclass(frozen=True)
class AblatedSingly:
    """Label logits of the whole model, and without each head of a circuit by itself."""

    circuit: Circuit
    encoded: Encoded
    labels: Float[Tensor, "run example label"]


def ablated_singly(
    verb: str,
    model: HookedModel,
    task: Task,
    heads: Circuit | Iterable[Head],
    baseline: MeanBaseline,
    *,
    max_examples: int | None,
    batch_size: int,
    rows: int = 256,
    seed: int,
    quiet: bool,
) -> AblatedSingly:
    """Check what a verb on single heads was given, and ablate each of them.

    Raises:
        InputError: if there are no heads, or circuit or baseline are of another model or task.
    """
    check_types(
        verb,
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        heads=(heads, (Circuit, Iterable), CIRCUIT),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    baseline.check_task(task)
    baseline.check_model(model)
    g = model.geometry
    chosen = heads if isinstance(heads, Circuit) else Circuit.of(heads, g.n_layers, g.n_heads)
    chosen.check_model(model)
    if not len(chosen):
        raise InputError("There are no heads to ablate: choose some with scores.top.")
    encoded = baseline.encode(model, task, discovery_examples(task, baseline, max_examples, seed))
    everything = head_mask(g, g.n_layers, g.n_heads)
    each = [everything & ~head_mask([head], g.n_layers, g.n_heads) for head in chosen]
    labels = circuit_label_logits(
        model,
        encoded,
        torch.stack([everything, *each]),
        baseline,
        batch_size=batch_size,
        rows=rows,
        label="Ablating heads",
        quiet=quiet,
    )
    return AblatedSingly(chosen, encoded, labels)
