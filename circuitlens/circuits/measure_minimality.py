"""Minimality: does the circuit need each of its heads?

For every head h of a circuit C,

    f(C) − f(C ∖ {h})

is what f, the normalised margin (:mod:`circuitlens.circuits.curve`), loses when h is
ablated as well. A head whose loss is not above 0 could be left out. This is the minimality of Wang
et al. 2023 (arXiv 2211.00593) with only the head removed; they also remove sets of heads with it,
so a head with a stand-in inside the circuit looks needless here and not there.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.ablation import circuit_label_logits, head_mask
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import (
    caveat_of,
    caveat_of_draws,
    normalised,
    note,
    ratio_interval,
)
from circuitlens.circuits.measure_faithfulness import unseen_examples
from circuitlens.errors import BASELINE, CIRCUIT, MODEL, TASK, InputError, check_types
from circuitlens.models.batch import margin
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Example, Task
from circuitlens.utils.bootstrap import resampled_means
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = ["Minimality", "minimality"]

_SCHEMA = "circuitlens.minimality/1"

_TENSORS = ("empty_margin", "full_margin", "circuit_margin", "without_margin")


@dataclass(frozen=True, eq=False, repr=False)
class Minimality:
    """What a circuit loses with each of its heads. Margins are in logits.

    Attributes:
        circuit: the circuit; results are in the order of its heads.
        empty_margin: of the model without any head on each example.
        full_margin: of the whole model.
        circuit_margin: of the circuit alone.
        without_margin: of the circuit without each of its heads.
        example_ids: the examples, none of which discovery saw.
        provenance: where it comes from.
    """

    circuit: Circuit
    empty_margin: Float[np.ndarray, " example"]
    full_margin: Float[np.ndarray, " example"]
    circuit_margin: Float[np.ndarray, " example"]
    without_margin: Float[np.ndarray, "head example"]
    example_ids: tuple[str, ...]
    provenance: Provenance

    def _normalise(self, values: np.ndarray) -> np.ndarray:
        return normalised(values, self.empty_margin.mean(), self.full_margin.mean())

    @property
    def faithfulness(self) -> float:
        """Normalised margin f of the circuit."""
        return float(self._normalise(self.circuit_margin.mean(keepdims=True))[0])

    @property
    def loss(self) -> Float[np.ndarray, " head"]:
        """What f of the circuit loses without each of its heads; NaN where f has no meaning."""
        return self.faithfulness - self._normalise(self.without_margin.mean(1))

    @cached_property
    def _drawn(self) -> Float[np.ndarray, "draw row"]:
        rows = [self.empty_margin, self.full_margin, self.circuit_margin, *self.without_margin]
        return resampled_means(np.stack(rows), self.provenance.seed)

    @property
    def _denominators(self) -> Float[np.ndarray, " draw"]:
        return np.asarray(self._drawn[:, 1] - self._drawn[:, 0])

    @property
    def caveat(self) -> str | None:
        """Why losses, or their intervals, have no meaning; ``None`` where they have."""
        found = caveat_of(self.empty_margin.mean(), self.full_margin.mean())
        return found or caveat_of_draws(self._denominators)

    def interval(self, level: float = 0.95) -> Float[np.ndarray, "bound head"]:
        """Percentile bootstrap interval of :attr:`loss` over examples (1,000 draws).

        NaN where :attr:`caveat` explains why.

        Raises:
            InputError: if ``level`` is not between 0 and 1.
        """
        losses = self._drawn[:, 2:3] - self._drawn[:, 3:]
        return ratio_interval(losses, self._denominators, level)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per head, the largest loss first, with 95 % intervals."""
        low, high = self.interval()
        frame = self.circuit.to_frame().assign(loss=self.loss, low=low, high=high)
        return frame.sort_values("loss", ascending=False, kind="stable", ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        meta: dict[str, Any] = {
            "circuit": self.circuit.to_dict(),
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
        }
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in _TENSORS}
        write_tensors(Path(path), _SCHEMA, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> Minimality:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            return cls(
                circuit=Circuit.from_dict(meta["circuit"]),
                example_ids=tuple(meta["example_ids"]),
                provenance=Provenance.from_dict(meta["provenance"]),
                **{name: tensor.numpy() for name, tensor in tensors.items()},
            )

    def __repr__(self) -> str:
        return (
            f"Minimality({self.provenance.task}: {len(self.circuit)} heads, "
            f"{len(self.example_ids)} examples)"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame()[["head", "loss", "low", "high"]]
        return (
            f"<p><b>Minimality</b> of {html.escape(self.circuit.selection)} on "
            f"{html.escape(self.provenance.task)}: {len(self.example_ids)} examples, f of the "
            f"circuit {self.faithfulness:.3f}</p>"
            f"{note(self.caveat)}{table.to_html(index=False, float_format='{:.3f}'.format)}"
        )


def minimality(
    model: HookedModel,
    task: Task,
    circuit: Circuit,
    baseline: MeanBaseline,
    examples: Sequence[Example] | None = None,
    *,
    batch_size: int = 32,
    rows: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> Minimality:
    """Measure what a circuit loses with each of its heads (equation: module docstring).

    Args:
        model: the model that the circuit was found in.
        task: gives the held-out examples (pool B and validation of the source language).
        circuit: at least one head.
        baseline: the means that replace the ablated heads, and the positions where they do.
        examples: use these instead of the held-out ones.
        batch_size: examples that are padded to one width and share a clean run.
        rows: prompts that go through the model at once; halves when memory runs out.
        seed: for the bootstrap.
        quiet: no progress bar.

    Raises:
        InputError: if the circuit is empty or of a model of another size, the baseline is of
            another model or task, there are no examples, or one was used for discovery.
    """
    check_types(
        "minimality",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        circuit=(circuit, Circuit, CIRCUIT),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    baseline.check_task(task)
    baseline.check_model(model)
    g = model.geometry
    circuit.check_model(model)
    if not len(circuit):
        raise InputError("The circuit has no heads to remove: choose a larger one.")
    examples = unseen_examples(task, examples, set(baseline.example_ids))
    encoded = baseline.encode(model, task, examples)
    sets = [(), tuple(g), circuit.heads]
    sets += [tuple(h for h in circuit if h != head) for head in circuit]
    labels = circuit_label_logits(
        model,
        encoded,
        torch.stack([head_mask(heads, g.n_layers, g.n_heads) for heads in sets]),
        baseline,
        batch_size=batch_size,
        rows=rows,
        label="Minimality",
        quiet=quiet,
    )
    margins = margin(labels, torch.tensor(encoded.gold)).numpy()
    settings = {"positions": baseline.positions, "pooling": baseline.pooling}
    return Minimality(
        circuit=circuit,
        empty_margin=margins[0],
        full_margin=margins[1],
        circuit_margin=margins[2],
        without_margin=margins[3:],
        example_ids=encoded.ids,
        provenance=baseline.provenance_of(model, task, seed, settings),
    )
