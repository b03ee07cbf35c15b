"""Sums of node outputs, label by label, of which a baseline takes its means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitlens.models.batch import Batch
from circuitlens.models.hooked import HookedModel
from circuitlens.utils.processes import summed

__all__ = ["LabelSums", "NodeOutputs"]

# Of a layer: of all its heads, and of its MLP; or of its neurons.
NodeOutputs = tuple[Float[Tensor, "row pos _"], ...]


class LabelSums:
    """Running sums of node outputs, label by label, over positions and (if wanted) at each."""

    def __init__(self, model: HookedModel, n_labels: int, width: int, size: int) -> None:
        """Begin with nothing.

        Args:
            model: whose outputs come.
            n_labels: labels that are told apart.
            width: positions that are told apart, counted from the end; 0 for none.
            size: entries of all outputs of a layer.
        """
        g = model.geometry
        options = {"dtype": torch.float64, "device": model.device}
        self.pooled = torch.zeros(n_labels, g.n_layers, size, **options)  # type: ignore[call-overload]
        self.examples = torch.zeros(n_labels, **options)  # type: ignore[call-overload]
        self.at = torch.zeros(n_labels, width, g.n_layers, size, **options)  # type: ignore[call-overload]
        self.reach = torch.zeros(n_labels, width, **options)  # type: ignore[call-overload]

    def add(
        self,
        outputs: Sequence[NodeOutputs],
        batch: Batch,
        mask: Bool[Tensor, "row pos"],
        right: Bool[Tensor, " batch"],
    ) -> None:
        """Count the examples that were answered correctly, at the positions of ``mask``."""
        # The rows of an example side by side.
        n = len(batch)
        gold, mask = batch.gold[right], mask.reshape(n, -1)[right]
        chosen = mask.double()
        wide = torch.promote_types(outputs[0][0].dtype, torch.float32)
        weights = (chosen / chosen.sum(-1, keepdim=True))[:, None].to(wide)
        outside, whole = ~mask[..., None], bool(right.all())
        self.examples.index_add_(0, gold, torch.ones_like(gold, dtype=torch.float64))
        first = self.at.shape[1] - mask.shape[1]
        if self.at.shape[1]:
            self.reach[:, first:].index_add_(0, gold, chosen)
        for layer, pair in enumerate(outputs):
            parts = [part.reshape(n, -1, part.shape[-1]) for part in pair]
            if not whole:
                parts = [part[right] for part in parts]
            # Some models give NaN in the padding, and NaN · 0 is NaN.
            parts = [part.masked_fill(outside, 0.0).to(wide) for part in parts]
            # Means over the positions of one example; sums over examples are in float64.
            means = [torch.bmm(weights, part)[:, 0] for part in parts]
            self.pooled[:, layer].index_add_(0, gold, torch.cat(means, -1).double())
            if self.at.shape[1]:
                self.at[:, first:, layer].index_add_(0, gold, torch.cat(parts, -1).double())

    def share(self, device: torch.device) -> None:
        """Add up what processes that work together have counted."""
        for name in ("pooled", "examples", "at", "reach"):
            setattr(self, name, summed(getattr(self, name), device))

    def means(
        self, balanced: bool = True
    ) -> tuple[Float[Tensor, "layer node_outputs"], Float[Tensor, "pos layer node_outputs"]]:
        """Means over positions and at each; where none reaches, the former.

        Args:
            balanced: labels count the same, however many examples they have.
        """
        if balanced:
            pooled = (self.pooled / self.examples[:, None, None]).mean(0)
            at = (self.at / self.reach[:, :, None, None]).mean(0)
        else:
            pooled = self.pooled.sum(0) / self.examples.sum()
            at = self.at.sum(0) / self.reach.sum(0)[:, None, None]
        reached = (self.reach > 0).all(0)[:, None, None]
        return pooled, torch.where(reached, at, pooled)
