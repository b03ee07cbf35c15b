"""What replaces embeddings: an encoder's features of sounds and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuitlens.models.hooks import Hook

__all__ = ["Features", "replaced", "replacing"]


class Features(NamedTuple):
    """What replaces embeddings.

    Attributes:
        values: output of encoder and projector; 0 where tokens have their own embedding.
        places: where it stands.
    """

    values: Float[Tensor, "*row pos d_model"]
    places: Bool[Tensor, "*row pos"]


@contextmanager
def replacing(embedding: nn.Module, features: Features | None) -> Iterator[None]:
    """Within the block, put features in the places of what ``embedding`` gives."""
    if features is None:
        yield
        return
    hook = replaced(features)
    handle = embedding.register_forward_hook(lambda _module, _inputs, output: hook(output))
    try:
        yield
    finally:
        handle.remove()


def replaced(features: Features, then: Hook | None = None) -> Callable[[Tensor], Tensor]:
    """A function that puts features in the places of embeddings, and calls a hook on the result."""

    def put(embeddings: Tensor) -> Tensor:
        places = features.places.to(embeddings.device)[..., None]
        found = torch.where(places, features.values.to(embeddings), embeddings)
        changed = None if then is None else then(found)
        return found if changed is None else changed

    return put
