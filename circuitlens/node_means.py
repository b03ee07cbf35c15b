"""What nodes are measured from and set to: means, or the activations of other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitlens.errors import InputError
from circuitlens.models.batch import Batch
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import recording

__all__ = ["NodeMeans", "PairedMeans"]


@dataclass(frozen=True)
class NodeMeans:
    """Means of all heads, and of all MLPs if they are nodes too.

    Index 0 of the position axis is the mean over positions. If there are more, they are means of
    single positions, counted from the end of the prompt (the last index is the last token), and
    index 0 serves for positions further to the left than any of them.

    Attributes:
        heads: of z, the output of each head before W_O.
        mlps: of the output of each MLP, if known.
        neurons: of what the output map of each MLP reads, over positions, if known.
    """

    heads: Float[Tensor, "layer pos head d_head"]
    mlps: Float[Tensor, "layer pos d_model"] | None = None
    neurons: Float[Tensor, "layer neuron"] | None = None

    @classmethod
    def pooled(
        cls,
        heads: Float[Tensor, "layer head d_head"],
        mlps: Float[Tensor, "layer d_model"] | None = None,
    ) -> NodeMeans:
        """Use the same mean at every position."""
        return cls(heads[:, None], None if mlps is None else mlps[:, None])

    def of_heads(self, layer: int, like: Tensor) -> Float[Tensor, "pos head d_head"]:
        """Means of a layer's heads for prompts as wide as z in ``like``, in its type."""
        return _aligned(self.heads[layer], like)

    def of_mlp(self, layer: int, like: Tensor) -> Float[Tensor, "pos d_model"]:
        """Mean of a layer's MLP for prompts as wide as the output in ``like``, in its type.

        Raises:
            InputError: if MLP means are unknown.
        """
        if self.mlps is None:
            raise InputError(
                "An MLP is a source here, but the means are those of heads only: give MLP means "
                "(cl.label_balanced_mean takes them)."
            )
        return _aligned(self.mlps[layer], like)

    def of_neurons(self, layer: int, like: Tensor) -> Float[Tensor, " neuron"]:
        """Means of a layer's neurons, in the type of ``like``.

        Raises:
            InputError: if they are unknown.
        """
        if self.neurons is None:
            raise InputError("Neurons are nodes here, but the means are those of heads and MLPs.")
        return self.neurons[layer].to(like)

    def on(self, model: HookedModel, batch: Batch) -> NodeMeans:
        """What nodes are set to in a batch: these means, or (if paired) other prompts' outputs."""
        return self

    def of_rows(self, rows: Int[Tensor, " row"]) -> NodeMeans:
        """The same for some rows of the batch, in their order."""
        return self


@dataclass(frozen=True)
class PairedMeans(NodeMeans):
    """Every prompt has a partner, whose activations its nodes are measured from and set to.

    Where a partner's prompt does not reach, the means are used.
    """

    @torch.no_grad()
    def on(self, model: HookedModel, batch: Batch) -> NodeMeans:
        """Run the partners of a batch.

        Raises:
            InputError: if it has none.
        """
        if batch.partner is None:
            raise InputError(
                "Heads are measured from the activations of other prompts, and these prompts have "
                "none: encode the examples with baseline.encode."
            )
        layers = range(model.geometry.n_layers)
        names = [hook(layer) for layer in layers for hook in (model.z_hook, model.mlp_hook)]
        hooks, found = recording(names)
        model.label_logits(batch.partner, hooks)
        return _RowMeans(
            self.heads,
            self.mlps,
            self.neurons,
            [found[model.z_hook(layer)] for layer in layers],
            [found[model.mlp_hook(layer)] for layer in layers],
            batch.partner.attention_mask.bool(),
            batch.readout.pad_right,
        )


@dataclass(frozen=True)
class _RowMeans(NodeMeans):
    """Outputs of the partners of a batch, aligned with its prompts at the decision."""

    z: Sequence[Float[Tensor, "row place head d_head"]] = ()
    outputs: Sequence[Float[Tensor, "row place d_model"]] = ()
    reach: Bool[Tensor, "row place"] = field(default_factory=lambda: torch.zeros(0, 0).bool())
    from_start: bool = False

    def of_heads(self, layer: int, like: Tensor) -> Float[Tensor, "row pos head d_head"]:
        """Outputs of a layer's heads for prompts as wide as z in ``like``, in its type."""
        return self._over(super().of_heads(layer, like), self.z[layer], like)

    def of_mlp(self, layer: int, like: Tensor) -> Float[Tensor, "row pos d_model"]:
        """Output of a layer's MLP for prompts as wide as that in ``like``, in its type."""
        return self._over(super().of_mlp(layer, like), self.outputs[layer], like)

    def of_rows(self, rows: Int[Tensor, " row"]) -> NodeMeans:
        """The same for some rows of the batch, in their order."""
        return _RowMeans(
            self.heads,
            self.mlps,
            self.neurons,
            [z[rows] for z in self.z],
            [out[rows] for out in self.outputs],
            self.reach[rows],
            self.from_start,
        )

    def _over(self, means: Tensor, partners: Tensor, like: Tensor) -> Tensor:
        """Partners' outputs where they reach, means elsewhere."""
        n, width = len(partners), like.shape[1]
        filled = means.expand(n, *means.shape).clone()
        shared = min(width, partners.shape[1])
        own, theirs = slice(-shared, None), slice(-shared, None)
        if self.from_start:
            own = theirs = slice(0, shared)
        there = self.reach[:, theirs].reshape(n, shared, *[1] * (partners.ndim - 2))
        filled[:, own] = torch.where(there, partners[:, theirs].to(like), filled[:, own])
        # Copies of a batch follow each other.
        return filled.repeat(like.shape[0] // n, *[1] * (filled.ndim - 1))


def _aligned(means: Tensor, like: Tensor) -> Tensor:
    width = like.shape[1]
    index = torch.arange(len(means) - width, len(means), device=means.device).clamp(min=0)
    return means[index].to(like)
