"""The label-balanced mean of every head.

1. Run the pool-A examples and keep those that the model answers correctly.
2. For every example average each head's output z over the chosen positions.
3. Average over the examples of each label, then over labels:

       μ_h = 1/|Y| Σ_y  1/|D_y| Σ_{x ∈ D_y} z_h(x)

Class directions cancel in the mean over labels, so μ_h holds what the head always says and no
answer; no counterfactual prompts are needed (CT-SFT, arXiv 2601.08146).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.batch import Positions, label_logits
from circuitlens.errors import CompetenceError, InputError
from circuitlens.evaluation import near_chance
from circuitlens.model import Hook, HookedModel
from circuitlens.progress import progress
from circuitlens.provenance import Provenance
from circuitlens.storage import read_tensors, write_tensors
from circuitlens.tasks import Example, Task

__all__ = ["MeanBaseline", "label_balanced_mean"]

_SCHEMA = "circuitlens.baseline/1"


@dataclass(frozen=True)
class MeanBaseline:
    """Mean output of every head over a task, and the examples it was taken on.

    Attributes:
        mean: μ, float32 at least.
        positions: ``"all"`` prompt positions but ``<s>``, or the ``"decision"`` position.
        example_ids: the correctly answered examples; discovery runs on these.
        n_per_label: how many there are for each label.
        accuracy: share of the examples tried that were answered correctly.
        provenance: where it comes from.
    """

    mean: Float[Tensor, "layer head d_head"]
    positions: Positions
    example_ids: tuple[str, ...]
    n_per_label: dict[str, int]
    accuracy: float
    provenance: Provenance

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        meta = {
            "positions": self.positions,
            "example_ids": list(self.example_ids),
            "n_per_label": self.n_per_label,
            "accuracy": self.accuracy,
            "provenance": self.provenance.to_dict(),
        }
        write_tensors(Path(path), _SCHEMA, {"mean": self.mean}, meta)

    @classmethod
    def load(cls, path: str | Path) -> MeanBaseline:
        """Read what :meth:`save` wrote."""
        tensors, meta = read_tensors(Path(path), _SCHEMA)
        return cls(
            mean=tensors["mean"],
            positions=meta["positions"],
            example_ids=tuple(meta["example_ids"]),
            n_per_label=meta["n_per_label"],
            accuracy=meta["accuracy"],
            provenance=Provenance.from_dict(meta["provenance"]),
        )

    def to_frame(self) -> pd.DataFrame:
        """Return the norm of every head's mean."""
        norms = self.mean.norm(dim=-1)
        n_layers, n_heads = norms.shape
        return pd.DataFrame(
            {
                "layer": torch.arange(n_layers).repeat_interleave(n_heads),
                "head": torch.arange(n_heads).repeat(n_layers),
                "norm": norms.flatten(),
            }
        )

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{html.escape(k)}: {v}" for k, v in self.n_per_label.items())
        return (
            f"<p><b>MeanBaseline</b> of {html.escape(self.provenance.task)} at "
            f"{self.positions} positions; correct examples {counts} "
            f"(accuracy {self.accuracy:.3f})</p>"
        )

    def check_model(self, model: HookedModel) -> None:
        """Refuse a model with other weights than those the means were taken from.

        Raises:
            InputError: if the weights differ.
        """
        if model.fingerprint() != self.provenance.model_fingerprint:
            raise InputError(
                f"The baseline was taken from other weights than those of {model.name}: "
                "call cl.label_balanced_mean on this model first."
            )


@torch.no_grad()
def label_balanced_mean(
    model: HookedModel,
    task: Task,
    *,
    positions: Positions = "all",
    examples: Sequence[Example] | None = None,
    batch_size: int = 32,
    allow_chance: bool = False,
    quiet: bool = False,
) -> MeanBaseline:
    """Take the label-balanced mean of every head's output (module docstring, equation).

    Args:
        model: competent in the task.
        task: gives pool A.
        positions: average over ``"all"`` prompt positions but ``<s>`` (each example counts
            once, whatever its length), or take the ``"decision"`` position only.
        examples: use these instead of pool A.
        batch_size: examples per forward pass; the result does not depend on it.
        allow_chance: go on although the model does no better than chance.
        quiet: no progress bar.

    Raises:
        CompetenceError: if the accuracy is near chance.
        InputError: if no example of a label is answered correctly; the label is named.
    """
    examples = task["pool_a"] if examples is None else tuple(examples)
    encoded = task.encode(model, examples)
    g = model.geometry
    labels = list(task.labels)
    sums = torch.zeros(
        len(labels), g.n_layers, g.n_heads, g.d_head, dtype=torch.float64, device=model.device
    )
    counts = torch.zeros(len(labels), dtype=torch.float64, device=model.device)
    correct: list[int] = []
    batches = encoded.batches(batch_size, model.device)
    for index, batch in progress(
        batches, "Mean of every head", quiet=quiet, total=encoded.n_batches(batch_size)
    ):
        mask = batch.mask(positions).double()
        weights = mask / mask.sum(-1, keepdim=True)
        means: dict[int, Tensor] = {}

        def keep(layer: int, means: dict[int, Tensor] = means, weights: Tensor = weights) -> Hook:
            def hook(z: Tensor) -> None:
                means[layer] = torch.einsum("bphd,bp->bhd", z.double(), weights)

            return hook

        logits = model.logits(batch, {model.z_hook(n): keep(n) for n in range(g.n_layers)})
        right = label_logits(logits, batch).argmax(1) == batch.gold
        stacked = torch.stack([means[n] for n in range(g.n_layers)], dim=1)[right]
        sums.index_add_(0, batch.gold[right], stacked)
        counts += torch.bincount(batch.gold[right], minlength=len(labels))
        correct += index[right.cpu()].tolist()
    chance, majority = near_chance(len(correct), encoded.gold)
    accuracy = len(correct) / len(encoded)
    if chance and not allow_chance:
        raise CompetenceError(
            f"{model.name} answers {accuracy:.1%} of {len(encoded)} {task.name}/{task.language} "
            f"examples correctly, which is near chance (the most frequent label has "
            f"{majority:.1%}): train it with cl.finetune first, or pass allow_chance=True.",
            model,
        )
    for label, count in zip(labels, counts.tolist(), strict=True):
        if not count:
            raise InputError(
                f"No example of the label {label!r} is answered correctly, so its mean is "
                "unknown: train the model further or give more examples of it."
            )
    mean = (sums / counts[:, None, None, None]).mean(0)
    settings = {"positions": positions, "n_examples": len(encoded)}
    return MeanBaseline(
        mean=mean.to(torch.promote_types(model.dtype, torch.float32)).cpu(),
        positions=positions,
        example_ids=tuple(encoded.ids[i] for i in sorted(correct)),
        n_per_label={n: int(c) for n, c in zip(labels, counts.tolist(), strict=True)},
        accuracy=accuracy,
        provenance=Provenance(
            model.name,
            model.fingerprint(),
            f"{task.name}/{task.language}",
            task.fingerprint(),
            task.seed,
            settings,
        ),
    )
