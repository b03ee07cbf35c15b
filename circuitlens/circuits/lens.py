"""The margin that each layer has reached: a logit lens of the task.

The residual stream that enters a layer is passed straight to the model's end, its last norm and
head, as if no later layer were there (the logit lens; nostalgebraist 2020). What is read there is
the task margin, so that one sees in which layers the answer is made.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitlens.errors import MODEL, TASK, InputError, check_types
from circuitlens.models.batch import margin
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import recording
from circuitlens.tasks import Example, Task
from circuitlens.utils.bootstrap import percentiles, resampled_means
from circuitlens.utils.progress import progress
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = ["MarginByLayer", "margin_by_layer"]

_SCHEMA = "circuitlens.margin-by-layer/1"


@dataclass(frozen=True, eq=False, repr=False)
class MarginByLayer:
    """Task margin and answer after every layer, on every example.

    Attributes:
        per_example: margins in logits; the first is that of the embeddings, the last that of the
            whole model.
        right: whether the right label has the largest logit there.
        labels: label of every example.
        example_ids: the examples.
        provenance: where it comes from.
    """

    per_example: Float[Tensor, "example stage"]
    right: Bool[Tensor, "example stage"]
    labels: tuple[str, ...]
    example_ids: tuple[str, ...]
    provenance: Provenance

    @property
    def stages(self) -> tuple[str, ...]:
        """What the margins come after: the embeddings, then each layer."""
        return ("embeddings", *(f"layer {n}" for n in range(self.per_example.shape[1] - 1)))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per stage.

        Mean ``margin`` with its 95 % interval (``low``, ``high``), ``accuracy``, and the mean
        margin of the examples of every label (``margin LABEL``).
        """
        values = self.per_example.double()
        low, high = percentiles(resampled_means(values.T.numpy(), self.provenance.seed), 0.95)
        found = {
            "stage": self.stages,
            "margin": values.mean(0).numpy(),
            "low": np.asarray(low),
            "high": np.asarray(high),
            "accuracy": self.right.double().mean(0).numpy(),
        }
        for label in dict.fromkeys(self.labels):
            mine = torch.tensor([other == label for other in self.labels])
            found[f"margin {label}"] = values[mine].mean(0).numpy()
        return pd.DataFrame(found)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        meta = {
            "labels": list(self.labels),
            "example_ids": list(self.example_ids),
            "provenance": self.provenance.to_dict(),
        }
        tensors = {"per_example": self.per_example, "right": self.right}
        write_tensors(Path(path), _SCHEMA, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> MarginByLayer:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            return cls(
                tensors["per_example"],
                tensors["right"],
                tuple(meta["labels"]),
                tuple(meta["example_ids"]),
                Provenance.from_dict(meta["provenance"]),
            )

    def __repr__(self) -> str:
        n, stages = self.per_example.shape
        return f"MarginByLayer({self.provenance.task}: {stages - 1} layers, {n} examples)"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return f"<p><b>MarginByLayer</b> on {html.escape(self.provenance.task)}</p>{table}"


@torch.no_grad()
def margin_by_layer(
    model: HookedModel,
    task: Task,
    *,
    examples: Sequence[Example] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    quiet: bool = False,
) -> MarginByLayer:
    """Read the task margin after every layer (module docstring).

    Args:
        model: any model that the task fits.
        task: the task.
        examples: by default those of the validation split.
        batch_size: examples per forward pass; the result does not depend on it.
        seed: of bootstrap intervals.
        quiet: no progress bar.

    Raises:
        InputError: if there are no examples.
    """
    check_types("margin_by_layer", model=(model, HookedModel, MODEL), task=(task, Task, TASK))
    chosen = task["validation"] if examples is None else tuple(examples)
    if not chosen:
        raise InputError("There are no examples to look at: give some.")
    encoded = task.encode(model, chosen)
    n_layers = model.geometry.n_layers
    entering = [f"blocks.{layer}.hook_in" for layer in range(n_layers)]
    last = n_layers - 1
    margins = torch.zeros(len(encoded), n_layers + 1, dtype=torch.float64)
    right = torch.zeros(len(encoded), n_layers + 1, dtype=torch.bool)
    batches, total = encoded.batches(batch_size, model.device), encoded.n_batches(batch_size)
    for index, batch in progress(batches, "Margin by layer", quiet=quiet, total=total):
        hooks, found = recording(entering)
        outputs = [model.label_logits(batch, hooks)]
        for name in reversed(entering):
            residual = found[name]

            def skip(output: Tensor, residual: Tensor = residual) -> Tensor:
                return residual

            with model.starting_at(last, residual) if last else nullcontext():
                outputs.append(model.label_logits(batch, {f"blocks.{last}.hook_out": skip}))
        for stage, labels in enumerate(reversed(outputs)):
            margins[index, stage] = margin(labels, batch.gold).double().cpu()
            right[index, stage] = (labels.argmax(1) == batch.gold).cpu()
    settings = {"n_examples": len(encoded)}
    return MarginByLayer(
        margins,
        right,
        tuple(e.label for e in chosen),
        encoded.ids,
        Provenance(
            model.name, model.fingerprint(), task.full_name, task.fingerprint(), seed, settings
        ),
    )
