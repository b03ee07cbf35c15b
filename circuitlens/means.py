"""What a node is set to when its own output is taken away: its mean, pooled or by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.errors import InputError

__all__ = ["NodeMeans"]


@dataclass(frozen=True)
class NodeMeans:
    """Means of all heads, and of all MLPs if they are nodes too.

    Index 0 of the position axis is the mean over positions. If there are more, they are means of
    single positions, counted from the end of the prompt (the last index is the last token), and
    index 0 serves for positions further to the left than any of them.

    Attributes:
        heads: of z, the output of each head before W_O.
        mlps: of the output of each MLP, if known.
    """

    heads: Float[Tensor, "layer pos head d_head"]
    mlps: Float[Tensor, "layer pos d_model"] | None = None

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


def _aligned(means: Tensor, like: Tensor) -> Tensor:
    width = like.shape[1]
    index = torch.arange(len(means) - width, len(means), device=means.device).clamp(min=0)
    return means[index].to(like)
