"""Forward passes that begin at a layer, for measurements that change nothing below it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitlens.models.batch import Batch, Views
from circuitlens.models.hooks import Hook
from circuitlens.models.passes import beginning_at

__all__ = ["Shortened"]


class Shortened(Views):
    """What a :class:`circuitlens.HookedModel` can leave out of a forward pass."""

    @abstractmethod
    def logits(
        self, batch: Batch, hooks: Mapping[str, Hook] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """All logits where the answer is read."""

    @abstractmethod
    def unlabelled(self, tokens: Int[Tensor, "batch pos"]) -> Batch:
        """Unpadded token ids as a batch without labels."""

    @contextmanager
    def starting_at(
        self,
        layer: int,
        residual: Float[Tensor, "batch pos d_model"],
        z: Float[Tensor, "batch pos head d_head"] | None = None,
    ) -> Iterator[None]:
        """Let forward passes in this block begin at ``layer``, which is given ``residual``.

        With ``z`` (where :attr:`takes_z`) the heads of that layer are not computed either: these
        are their outputs, to which the hook of z is applied as usual.

        The blocks below pass their input through uncomputed. (TransformerLens' own
        ``start_at_layer`` replaces the residual stream too, but still computes them.)
        """
        below = list(self.bridge.blocks)[:layer]

        def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return (residual,) if self._blocks_return_tuples else residual

        # Read before the blocks are replaced: finding out runs the model.
        _ = self._blocks_return_tuples
        attention = self.bridge.blocks[layer].attn

        def write(*_: Any, **__: Any) -> Any:
            assert z is not None
            assert self._attention_returns is not None
            return (attention.o(z.flatten(2)), *[None] * (self._attention_returns - 1))

        replaced = below if z is None else [*below, attention]
        _ = z is not None and self._attention_returns
        try:
            for block in below:
                block.__dict__["forward"] = skip
            if z is not None:
                attention.__dict__["forward"] = write
            with beginning_at(layer, len(self.bridge.blocks)):
                yield
        finally:
            for module in replaced:
                del module.__dict__["forward"]

    @cached_property
    def takes_z(self) -> bool:
        """Whether :meth:`starting_at` can take z: attention returns just what W_O makes of it."""
        return self._attention_returns is not None

    @cached_property
    def _attention_returns(self) -> int | None:
        """Length of the tuple that attention returns, if its first item is W_O's output."""
        found: list[Any] = []
        attention = self.bridge.blocks[0].attn
        handles = [
            attention.o.register_forward_hook(lambda _m, _i, output: found.append(output)),
            attention.register_forward_hook(lambda _m, _i, output: found.append(output)),
        ]
        try:
            with torch.no_grad():
                self.logits(self.unlabelled(torch.zeros(1, 1, dtype=torch.long)))
        finally:
            for handle in handles:
                handle.remove()
        written, returned = found[0], found[1]
        if isinstance(returned, tuple) and torch.equal(returned[0], written):
            return len(returned)
        return None

    @cached_property
    def _blocks_return_tuples(self) -> bool:
        """Whether the blocks of this architecture return ``(hidden_states, …)``."""
        found: list[bool] = []
        handle = self.bridge.blocks[0].register_forward_hook(
            lambda _module, _inputs, output: found.append(isinstance(output, tuple))
        )
        try:
            with torch.no_grad():
                self.logits(self.unlabelled(torch.zeros(1, 1, dtype=torch.long)))
        finally:
            handle.remove()
        return found[0]
