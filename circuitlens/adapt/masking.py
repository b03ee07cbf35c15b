"""Gradient masking on full weights: the reference way to train slices of parameters.

Parameters that hold a selected entry get a hook that zeroes the gradient of all other entries;
every other parameter is frozen. AdamW moves an entry whose gradient has always been zero by
exactly zero, except for weight decay, which is therefore taken out of the optimiser and applied
to the selected entries only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

__all__ = ["masked_adamw", "only_selected_train"]

Masks = Mapping[str, Bool[Tensor, "..."]]


@contextmanager
def only_selected_train(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Within the block, gradients reach the entries selected by ``masks`` and no others.

    Args:
        model: its parameters are frozen or hooked, and restored afterwards.
        masks: selected entries by parameter name; a parameter without mask is frozen.
    """
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    handles = []
    try:
        for name, parameter in model.named_parameters():
            mask = masks.get(name)
            parameter.requires_grad_(mask is not None)
            if mask is not None and not bool(mask.all()):
                handles.append(parameter.register_hook(_zero_outside(mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _zero_outside(mask: Tensor) -> Any:
    # where(), not a product: an infinite gradient outside the mask must not become NaN.
    return lambda gradient: torch.where(mask, gradient, torch.zeros_like(gradient))


def masked_adamw(
    model: nn.Module, masks: Masks, *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Make AdamW with decoupled weight decay on the selected entries only."""
    parameters = {n: p for n, p in model.named_parameters() if n in masks}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    if weight_decay:

        @torch.no_grad()
        def decay(opt: torch.optim.Optimizer, *_: Any) -> None:
            rate = opt.param_groups[0]["lr"] * weight_decay
            for name, parameter in parameters.items():
                # The product leaves unselected entries as they are, to the bit: x · 1 = x.
                parameter.mul_(1 - rate * masks[name].to(parameter))

        optimizer.register_step_pre_hook(decay)
    return optimizer
