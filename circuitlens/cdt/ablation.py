"""Mean ablation: the model with every node outside a circuit at its mean, for many circuits.

1. The clean run of a batch leaves the residual stream entering each layer.
2. A circuit's run begins at the lowest layer in which a node is ablated; all below is clean, so
   it is not computed again.
3. Circuits that begin at the same layer go through as one batch of rows (circuit, prompt).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.models.batch import Batch, Positions
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import Hook, recording
from circuitlens.neurons import neuron_hook
from circuitlens.node_circuit import NodeKind
from circuitlens.node_means import NodeMeans
from circuitlens.nodes import Head
from circuitlens.tasks import Encoded
from circuitlens.utils.processes import mine, summed
from circuitlens.utils.progress import progress
from circuitlens.utils.row_budget import RowBudget

__all__ = ["PrefixCache", "ablated_label_logits", "circuit_label_logits", "head_mask"]

# Circuits between two ticks of the progress bar.
_TICK = 32


@dataclass(frozen=True)
class PrefixCache:
    """What the clean run of a batch leaves for ablated runs to begin with.

    Attributes:
        residuals: by layer, the residual stream entering it.
        labels: clean scores of the labels.
    """

    residuals: dict[int, Float[Tensor, "row pos d_model"]]
    labels: Float[Tensor, "batch label"]

    @classmethod
    @torch.no_grad()
    def capture(
        cls, model: HookedModel, batch: Batch, *, rows: int | RowBudget = 256
    ) -> PrefixCache:
        """Run ``batch`` and keep the residual stream entering each layer but the first.

        Args:
            model: the model.
            batch: prompts.
            rows: prompts that go through the model at once.
        """
        # What enters the first layer is as easily computed as kept.
        layers = range(1, model.geometry.n_layers)

        def run(chunk: range) -> tuple[dict[str, Tensor], Tensor]:
            hooks, found = recording(f"blocks.{layer}.hook_in" for layer in layers)
            labels = model.label_logits(batch.part(chunk), hooks)
            return found, labels

        parts = _budget(rows).chunked(len(batch), run, rows_per_item=batch.n_rows)
        return cls(
            {
                layer: torch.cat([found[f"blocks.{layer}.hook_in"] for found, _ in parts])
                for layer in layers
            },
            torch.cat([labels for _, labels in parts]),
        )


@torch.no_grad()
def ablated_label_logits(
    model: HookedModel,
    batch: Batch,
    keeps: Bool[Tensor, "circuit layer column"],
    means: NodeMeans,
    positions: Positions,
    *,
    prefix: PrefixCache | None = None,
    rows: int | RowBudget = 256,
    kind: NodeKind = "heads",
) -> Float[Tensor, "circuit batch label"]:
    """Label logits with every node outside each circuit at its mean.

    Args:
        model: the model.
        batch: prompts.
        keeps: the nodes of each circuit; all others are ablated. A circuit of all nodes gets the
            clean logits.
        means: what ablated nodes are set to, on the model's device.
        positions: where they are; elsewhere all nodes stay as they are.
        prefix: of this batch, if there already is one.
        rows: prompts that go through the model at once; sets memory, not the result. It halves
            when memory runs out.
        kind: what the columns of ``keeps`` are (:class:`circuitlens.node_circuit.NodeGrid`).

    Returns:
        Logits in at least float32.
    """
    budget = _budget(rows)
    means = means.on(model, batch)
    prefix = prefix or PrefixCache.capture(model, batch, rows=budget)
    keeps = keeps.to(model.device)
    where = batch.mask(positions)
    result = prefix.labels.repeat(len(keeps), 1, 1)
    for first, circuits in _by_lowest_layer(keeps):

        def run(
            chunk: range, first: int = first, circuits: Tensor = circuits
        ) -> Float[Tensor, "item label"]:
            # Item i is example i % B under circuit i // B.
            item = torch.arange(chunk.start, chunk.stop, device=model.device)
            example = item % len(batch)
            row = batch.rows_of(example)
            kept = keeps[circuits[item // len(batch)]].repeat_interleave(batch.n_rows, 0)
            hooks = _ablation(model, kept, means.of_rows(row), where[row], kind)
            with model.starting_at(first, prefix.residuals[first][row]) if first else nullcontext():
                return model.label_logits(batch.take(example), hooks)

        found = budget.chunked(len(circuits) * len(batch), run, rows_per_item=batch.n_rows)
        labels = torch.cat(found)
        result[circuits] = labels.unflatten(0, (len(circuits), len(batch)))
    return result


def circuit_label_logits(
    model: HookedModel,
    encoded: Encoded,
    keeps: Bool[Tensor, "circuit layer column"],
    baseline: MeanBaseline,
    *,
    kind: NodeKind = "heads",
    means: NodeMeans | None = None,
    batch_size: int = 32,
    rows: int = 256,
    label: str = "Ablating",
    quiet: bool = False,
) -> Float[Tensor, "circuit example label"]:
    """Label logits of all examples under many circuits; none is run twice.

    Args:
        model: the model.
        encoded: the examples.
        keeps: the nodes of each circuit; equal circuits may be among them.
        baseline: gives the means, and the positions at which nodes are ablated.
        kind: what the columns of ``keeps`` are (:class:`circuitlens.node_circuit.NodeGrid`).
        means: those of the baseline, if not given; neurons have others.
        batch_size: examples that are padded to one width and share a clean run.
        rows: prompts that go through the model at once.
        label: of the progress bar.
        quiet: no progress bar.
    """
    means = means or baseline.means(model.device)
    budget = RowBudget(rows)
    # Sorted by their bits, and so by their lowest ablated layer too: circuits of one piece
    # nearly always begin at the same layer.
    distinct, inverse = keeps.to(torch.uint8).unique(dim=0, return_inverse=True)
    pieces = distinct.bool().split(_TICK)
    shape = (len(distinct), len(encoded), encoded.readout.n_labels)
    # Zeros, to which processes that work together add what they find.
    found = torch.zeros(shape, dtype=torch.float64)
    n_jobs = encoded.n_batches(batch_size) * len(pieces)
    own = set(mine(range(n_jobs), model.device))

    def jobs() -> Iterator[tuple[Tensor, Batch, PrefixCache, int]]:
        for place, (index, batch) in enumerate(encoded.batches(batch_size, model.device)):
            numbers = [n for n in range(len(pieces)) if place * len(pieces) + n in own]
            if numbers:
                prefix = PrefixCache.capture(model, batch, rows=budget)
                for number in numbers:
                    yield index, batch, prefix, number

    total = len(own)
    for index, batch, prefix, number in progress(jobs(), label, quiet=quiet, total=total):
        logits = ablated_label_logits(
            model,
            batch,
            pieces[number],
            means,
            baseline.positions,
            prefix=prefix,
            rows=budget,
            kind=kind,
        )
        start = number * _TICK
        found[start : start + len(logits), index] = logits.cpu().double()
    return summed(found, model.device)[inverse]


def head_mask(heads: Iterable[Head], n_layers: int, n_heads: int) -> Bool[Tensor, "layer head"]:
    """Lay heads out as a grid that is true where one of them is."""
    mask = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    for head in heads:
        mask[head.layer, head.index] = True
    return mask


def _budget(rows: int | RowBudget) -> RowBudget:
    return rows if isinstance(rows, RowBudget) else RowBudget(rows)


def _by_lowest_layer(
    keeps: Bool[Tensor, "circuit layer column"],
) -> Iterator[tuple[int, Int[Tensor, " chosen"]]]:
    """Lowest layers with an ablated node, and the circuits of which that is true."""
    ablates = ~keeps.all(-1)
    lowest = ablates.int().argmax(-1)
    for layer in lowest[ablates.any(-1)].unique().tolist():
        yield layer, ((lowest == layer) & ablates.any(-1)).nonzero()[:, 0]


def _ablation(
    model: HookedModel,
    keeps: Bool[Tensor, "row layer column"],
    means: NodeMeans,
    where: Bool[Tensor, "row pos"],
    kind: NodeKind,
) -> dict[str, Hook]:
    """Hooks that set the nodes which each row does not keep to their means."""
    n_heads = model.geometry.n_heads

    def heads(layer: int) -> Hook:
        kept = keeps[:, layer, :n_heads][:, None]
        if kind == "heads@positions":
            kept = keeps[:, layer].unflatten(-1, (-1, n_heads))

        def hook(z: Tensor) -> Tensor:
            away = where[:, :, None] & ~kept[:, -z.shape[1] :]
            return torch.where(away[..., None], means.of_heads(layer, z), z)

        return hook

    def mlp(layer: int) -> Hook:
        def hook(out: Tensor) -> Tensor:
            away = where & ~keeps[:, layer, n_heads][:, None]
            return torch.where(away[..., None], means.of_mlp(layer, out), out)

        return hook

    def neurons(layer: int) -> Hook:
        def hook(activation: Tensor) -> Tensor:
            away = where[:, :, None] & ~keeps[:, layer][:, None]
            return torch.where(away, means.of_neurons(layer, activation), activation)

        return hook

    hooks: dict[str, Hook] = {}
    for layer in (~keeps).any(-1).any(0).nonzero()[:, 0].tolist():
        if kind == "neurons":
            hooks[neuron_hook(model, layer)] = neurons(layer)
            continue
        hooks[model.z_hook(layer)] = heads(layer)
        if kind == "heads+mlps":
            hooks[model.mlp_hook(layer)] = mlp(layer)
    return hooks
