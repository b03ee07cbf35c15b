"""The label-balanced mean of every head and every MLP.

1. Run the pool-A examples and keep those that the model answers correctly.
2. For every example average each head's output z over the chosen positions (or keep positions
   apart, counted from the decision).
3. Average over the examples of each label, then over labels:

       μ_h = 1/|Y| Σ_y  1/|D_y| Σ_{x ∈ D_y} z_h(x)

   and in the same way for the output of every MLP.

Class directions cancel in the mean over labels, so μ_h holds what the head always outputs and
no answer; no counterfactual prompts are needed (CT-SFT, arXiv 2601.08146).
"""

from __future__ import annotations

import html
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.errors import (
    MODEL,
    TASK,
    CompetenceError,
    InputError,
    NotFiniteError,
    check_choice,
    check_types,
)
from circuitlens.label_sums import LabelSums, NodeOutputs
from circuitlens.models.batch import Batch, Positions
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import recording
from circuitlens.node_means import NodeMeans, PairedMeans
from circuitlens.nodes import MLP, Head, Node
from circuitlens.optimal_constants import optimal_constants
from circuitlens.tasks import Encoded, Example, Task
from circuitlens.tasks.evaluation import near_chance, refuse_not_finite
from circuitlens.tasks.examples import POOLS
from circuitlens.utils.processes import gathered, mine, n_processes
from circuitlens.utils.progress import progress
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_tensors, whole, write_tensors

__all__ = ["PAIRED", "MeanBaseline", "examples_by_id", "label_balanced_mean"]

_SCHEMA = "circuitlens.baseline/2"

_TENSORS = ("mean", "mlp_mean", "by_position", "mlp_by_position")

Pooling = Literal["pooled", "position"]
Reference = Literal["label-balanced", "mean", "zero", "optimal", "resample", "counterfactual"]
# Of these every prompt has a partner instead of a mean.
PAIRED = ("resample", "counterfactual")


@dataclass(frozen=True, eq=False, repr=False)
class MeanBaseline:
    """Mean output of every head and MLP over a task, and the examples it was taken on.

    Attributes:
        mean: μ of every head, at least float32.
        mlp_mean: μ of every MLP.
        by_position: heads' means of single positions counted from the end of the prompt (the last
            index is its last token), if those were asked for; where a label has no example as
            long as that, the mean over positions is used.
        mlp_by_position: the same for MLPs.
        positions: ``"all"`` but the first, the ``"decision"`` position, or ``"all+first"``.
        example_ids: the correctly answered examples; discovery runs on these.
        n_per_label: how many there are for each label.
        accuracy: share of the examples tried that were answered correctly.
        provenance: where it comes from.
    """

    mean: Float[Tensor, "layer head d_head"]
    mlp_mean: Float[Tensor, "layer d_model"]
    positions: Positions
    example_ids: tuple[str, ...]
    n_per_label: dict[str, int]
    accuracy: float
    provenance: Provenance
    by_position: Float[Tensor, "pos layer head d_head"] | None = None
    mlp_by_position: Float[Tensor, "pos layer d_model"] | None = None

    @property
    def pooling(self) -> Pooling:
        """Whether means are taken over positions or for each by itself."""
        return "pooled" if self.by_position is None else "position"

    @property
    def reference(self) -> str:
        """What heads are measured from and set to (see :func:`label_balanced_mean`)."""
        return str(self.provenance.settings.get("reference", "label-balanced"))

    def means(self, device: torch.device | None = None) -> NodeMeans:
        """Return the means as the engine takes them."""
        heads, mlps = self.mean[:, None], self.mlp_mean[:, None]
        if self.by_position is not None and self.mlp_by_position is not None:
            heads = torch.cat([heads, self.by_position.transpose(0, 1)], dim=1)
            mlps = torch.cat([mlps, self.mlp_by_position.transpose(0, 1)], dim=1)
        kind = PairedMeans if self.reference in PAIRED else NodeMeans
        return kind(heads.to(device), mlps.to(device))

    def encode(self, model: HookedModel, task: Task, examples: Sequence[Example]) -> Encoded:
        """Encode examples, each with its partner if heads are measured from other prompts.

        Raises:
            InputError: if an example has no counterfactual prompt, naming it.
        """
        encoded = task.encode(model, examples)
        if self.reference not in PAIRED:
            return encoded
        if self.reference == "resample":
            partners = self._of_another_label(task, examples)
        else:
            partners = [_counterfactual(task, example) for example in examples]
        other = task.encode(model, partners)
        return replace(encoded, partners=other.tokens, partner_features=other.features)

    def _of_another_label(self, task: Task, examples: Sequence[Example]) -> list[Example]:
        """For each example one of those that the baseline was taken on, with another label."""
        by_id = examples_by_id(task)
        known = [by_id[i] for i in self.example_ids]
        others = {label: [e for e in known if e.label != label] for label in task.labels}
        seed = self.provenance.seed
        # By its id alone, so that an example has the same partner whatever the others are.
        return [random.Random(f"{seed} {e.id}").choice(others[e.label]) for e in examples]

    def check_constant(self, what: str) -> None:
        """Reject a baseline in which every prompt has a partner instead of a mean.

        Raises:
            InputError: naming what needs means.
        """
        if self.reference in PAIRED:
            raise InputError(
                f"{what} needs means, and this baseline has reference={self.reference!r}: use "
                "cl.label_balanced_mean with another reference."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        meta = {
            "positions": self.positions,
            "example_ids": list(self.example_ids),
            "n_per_label": self.n_per_label,
            "accuracy": self.accuracy,
            "provenance": self.provenance.to_dict(),
        }
        tensors = {name: getattr(self, name) for name in _TENSORS}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        write_tensors(Path(path), _SCHEMA, kept, meta)

    @classmethod
    def load(cls, path: str | Path) -> MeanBaseline:
        """Read what :meth:`save` wrote."""
        with whole(path):
            tensors, meta = read_tensors(Path(path), _SCHEMA)
            return cls(
                **tensors,
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

    def __repr__(self) -> str:
        n_layers, n_heads, _ = self.mean.shape
        return (
            f"MeanBaseline({self.provenance.task}: {n_layers} layers of {n_heads} heads, "
            f"{self.positions} positions, {self.pooling}, {len(self.example_ids)} examples)"
        )

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{html.escape(k)}: {v}" for k, v in self.n_per_label.items())
        return (
            f"<p><b>MeanBaseline</b> of {html.escape(self.provenance.task)} at "
            f"{self.positions} positions; correct examples {counts} "
            f"(accuracy {self.accuracy:.3f})</p>"
        )

    def check_model(self, model: HookedModel) -> None:
        """Reject a model with other weights than those the means were taken from.

        Raises:
            InputError: if the weights differ.
        """
        if model.fingerprint() != self.provenance.model_fingerprint:
            raise InputError(
                f"The baseline was taken from other weights than those of {model.name}: "
                "call cl.label_balanced_mean on this model first."
            )

    def provenance_of(
        self, model: HookedModel, task: Task, seed: int, settings: dict[str, Any]
    ) -> Provenance:
        """Provenance of what was measured with these means, which are of these weights."""
        weights = self.provenance.model_fingerprint
        name, data = task.full_name, task.fingerprint()
        return Provenance(model.name, weights, name, data, seed, settings)

    def check_task(self, task: Task) -> None:
        """Reject a task other than the one the means were taken on.

        Ids do not tell tasks apart: parallel corpora share them between languages.

        Raises:
            InputError: if language, template, label words or examples differ.
        """
        if task.fingerprint() == self.provenance.data_fingerprint:
            return
        if task.full_name != self.provenance.task:
            how = f"{self.provenance.task}, not on {task.full_name}"
        else:
            how = f"{task.full_name} with another template, other label words or other examples"
        raise InputError(
            f"The baseline was taken on {how}: call cl.label_balanced_mean on this task first."
        )


@torch.no_grad()
def label_balanced_mean(
    model: HookedModel,
    task: Task,
    *,
    positions: Positions = "all",
    pooling: Pooling = "pooled",
    reference: Reference = "label-balanced",
    examples: Sequence[Example] | None = None,
    batch_size: int = 32,
    allow_chance: bool = False,
    quiet: bool = False,
) -> MeanBaseline:
    """Take the label-balanced mean of every head's and MLP's output (equation: module docstring).

    Args:
        model: competent in the task.
        task: gives pool A.
        positions: average over ``"all"`` prompt positions but the first, which is an attention
            sink with or without ``<s>`` (each example counts once, whatever its length); use the
            ``"decision"`` position only; or average over ``"all+first"``, the sink included.
        pooling: one mean for all these positions, or one for each ``"position"``, counted from
            the decision (of use where prompts are aligned there, as templates are).
        reference: what heads are measured from and set to. ``"label-balanced"`` is the method's;
            ``"mean"`` counts every example the same, so that what labels have in unequal numbers
            stays in it; ``"zero"`` is zero ablation, which removes a head's constant part too;
            ``"optimal"`` is the constant of each head at which circuits answer most like the whole
            model, learned on these examples (:mod:`circuitlens.optimal_constants`).
            ``"resample"`` has for every prompt the activations of an example with another label,
            and ``"counterfactual"`` those of its own counterfactual prompt (a column
            ``counterfactual``, or ``counterfactual_FIELD``), aligned at the decision. The last
            three are there for comparison with other tools; MLPs have label-balanced
            means under ``"optimal"``.
        examples: use these instead of pool A. Those of other pools of the task can be scored by
            :func:`circuitlens.relevance` too; others, with their own ids, give means only.
        batch_size: examples per forward pass; the result does not depend on it.
        allow_chance: continue even if the model does no better than chance.
        quiet: no progress bar.

    Raises:
        CompetenceError: if the accuracy is near chance.
        NotFiniteError: if a mean is NaN or infinite, naming the head or MLP, or the model answers
            nothing else, naming the weight.
        InputError: for unknown positions, pooling or reference, or one that an example or the
            pooling does not allow; if there are no examples, or one
            has the id of another of the task; or if no example of a label is answered correctly,
            which is named.
    """
    check_types(
        "label_balanced_mean",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
    )
    check_choice("positions", positions, get_args(Positions))
    check_choice("pooling", pooling, get_args(Pooling))
    check_choice("reference", reference, get_args(Reference))
    if pooling == "position" and positions == "decision":
        raise InputError(
            "pooling='position' has nothing to separate at positions='decision': leave one out."
        )
    if pooling == "position" and reference in ("optimal", *PAIRED):
        raise InputError(f"reference={reference!r} has no pooling by position: leave that out.")
    examples = task["pool_a"] if examples is None else _checked(task, examples)
    if reference == "counterfactual":
        for example in examples:
            _counterfactual(task, example)
    encoded = task.encode(model, examples)
    if pooling == "position" and (encoded.n_rows > 1 or encoded.readout.pad_right):
        raise InputError(
            "pooling='position' counts positions from the one decision, which the readout "
            f"{encoded.readout.name!r} does not have at the end of the prompt: use "
            "pooling='pooled'."
        )
    labels = list(task.labels)
    width = max(map(len, encoded.tokens)) if pooling == "position" else 0
    size = model.geometry.n_heads * model.geometry.d_head + model.geometry.d_model
    sums = LabelSums(model, len(labels), width, size)
    correct: list[int] = []
    batches = mine(encoded.batches(batch_size, model.device), model.device)
    total = -(-encoded.n_batches(batch_size) // n_processes(model.device))
    for index, batch in progress(batches, "Mean of every head", quiet=quiet, total=total):
        labels_found, outputs = _node_outputs(model, batch)
        if not bool(labels_found.isfinite().any()):
            refuse_not_finite(model, labels_found)
        right = labels_found.argmax(1) == batch.gold
        sums.add(outputs, batch, batch.once(batch.mask(positions)), right)
        correct += index[right.cpu()].tolist()
    correct = gathered(correct, model.device)
    sums.share(model.device)
    chance, majority = near_chance(len(correct), encoded.gold)
    accuracy = len(correct) / len(encoded)
    if chance and not allow_chance:
        raise CompetenceError(
            f"{model.name} answers {accuracy:.1%} of {len(encoded)} {task.full_name} "
            f"examples correctly, which is near chance (the most frequent label has "
            f"{majority:.1%}): train it with cl.finetune first, or pass allow_chance=True.",
            model,
        )
    counts = [int(count) for count in sums.examples.tolist()]
    for label, count in zip(labels, counts, strict=True):
        if not count:
            raise InputError(
                f"No example of the label {label!r} is answered correctly, so its mean is "
                "unknown: train the model further or give more examples of it."
            )
    g = model.geometry
    dtype = torch.promote_types(model.dtype, torch.float32)
    found = sums.means(balanced=reference != "mean")
    scale = 0.0 if reference == "zero" else 1.0
    pooled, by_position = ((scale * means).to(dtype).cpu() for means in found)
    _check_finite(model, torch.cat([pooled[None], by_position]))
    # Heads and MLPs were laid side by side.
    split = [g.n_heads * g.d_head, g.d_model]
    heads, mlps = pooled.split(split, dim=-1)
    heads_at, mlps_at = by_position.split(split, dim=-1)
    heads = heads.unflatten(-1, (g.n_heads, g.d_head))
    each = pooling == "position"
    if reference == "optimal":
        chosen = encoded.take(sorted(correct))
        heads = optimal_constants(model, chosen, heads, positions, seed=task.seed, quiet=quiet)
    settings = {"positions": positions, "pooling": pooling, "reference": reference}
    return MeanBaseline(
        mean=heads,
        mlp_mean=mlps,
        positions=positions,
        example_ids=tuple(encoded.ids[i] for i in sorted(correct)),
        n_per_label=dict(zip(labels, counts, strict=True)),
        accuracy=accuracy,
        provenance=Provenance(
            model.name,
            model.fingerprint(),
            task.full_name,
            task.fingerprint(),
            task.seed,
            {**settings, "n_examples": len(encoded)},
        ),
        by_position=heads_at.unflatten(-1, (g.n_heads, g.d_head)) if each else None,
        mlp_by_position=mlps_at if each else None,
    )


def _counterfactual(task: Task, example: Example) -> Example:
    """An example with the texts of its counterfactual prompt.

    Raises:
        InputError: if it has none.
    """
    if not example.counterfactual:
        raise InputError(
            f"Example {example.id!r} of {task.full_name} has no counterfactual prompt: give a "
            "column 'counterfactual' (or counterfactual_FIELD for some of several fields), or "
            "use another reference."
        )
    return replace(example, fields={**example.fields, **example.counterfactual})


def examples_by_id(task: Task) -> dict[str, Example]:
    """All examples of a task; an id occurs once in it."""
    return {e.id: e for pool in POOLS for e in task[pool]}


def _checked(task: Task, examples: Sequence[Example]) -> tuple[Example, ...]:
    examples = tuple(examples)
    if not examples:
        raise InputError(
            "There are no examples to take means of: give some, or leave examples out to use "
            "pool A."
        )
    own = examples_by_id(task)
    # Discovery looks the examples up by their ids, and would score other texts than these.
    if foreign := [e for e in examples if own.get(e.id, e) != e]:
        raise InputError(
            f"Example {foreign[0].id!r} has the id of another example of {task.full_name}: use "
            "the examples from this task, or give yours their own ids."
        )
    return examples


def _node_outputs(
    model: HookedModel, batch: Batch
) -> tuple[Float[Tensor, "batch label"], list[NodeOutputs]]:
    """Label logits, and for each layer the outputs of all heads and of the MLP."""
    layers = range(model.geometry.n_layers)
    names = [f(layer) for layer in layers for f in (model.z_hook, model.mlp_hook)]
    hooks, found = recording(names)
    logits = model.label_logits(batch, hooks)
    return logits, [(found[model.z_hook(n)].flatten(2), found[model.mlp_hook(n)]) for n in layers]


def _check_finite(model: HookedModel, means: Float[Tensor, "mean layer node_outputs"]) -> None:
    """Reject means that are NaN or infinite.

    Raises:
        NotFiniteError: naming the lowest node that has one.
    """
    g = model.geometry
    heads, mlps = (~means.isfinite()).any(0).split([g.n_heads * g.d_head, g.d_model], dim=-1)
    found = heads.unflatten(-1, (g.n_heads, g.d_head)).any(-1).nonzero().tolist()
    nodes: list[Node] = [Head(*index) for index in found]
    nodes += [MLP(*index) for index in mlps.any(-1).nonzero().tolist()]
    if nodes:
        lowest = min(nodes, key=lambda node: node.layer)
        raise NotFiniteError(
            f"The mean of {lowest} of {model.name} is not finite: load the model with dtype "
            f"float32 if {model.dtype} overflows, or go back to weights that have not diverged."
        )
