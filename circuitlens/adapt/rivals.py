"""Rivals that choose single entries of the weights before they train: by source data, or by trying.

* Source-Shielded Updates (Yamaguchi et al. 2025, arXiv 2512.04844): of every weight matrix in the
  layers the columns that matter most for the source stay frozen, half of them; a column matters by
  its norm times the norm of what it reads (the score of Wanda, Sun et al. 2023, arXiv 2306.11695,
  summed over a column). Of vectors the half with the largest entries stays frozen. Embeddings and
  the output layer are trained.
* Lottery ticket sparse fine-tuning (LT-SFT; Ansell et al. 2022, arXiv 2110.07560): all weights are
  trained once, and of the entries that moved most as many as the circuit's slices have are trained
  from the beginning. All norms are trained too, as for the circuit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitlens.adapt.choice import Choice
from circuitlens.adapt.makers import everything, slice_entries
from circuitlens.adapt.trainable import Trainable
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.models.geometry import norm_parameters
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Encoded

__all__ = ["column_importance", "lottery", "shield", "trained_first"]

_SHARE = 0.5
# As many source examples as the paper takes.
_MAX_EXAMPLES = 500


def shield(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """All weights but those columns that matter most for the source."""
    importance = column_importance(model, choice.old(model), seed=choice.seed)
    masks = {}
    inside = _in_layers(model)
    for name, parameter in model.hf.named_parameters():
        mask = torch.ones_like(parameter, dtype=torch.bool)
        if name in importance:
            columns = importance[name]
            frozen = columns.topk(int(_SHARE * len(columns))).indices
            axis = 0 if _is_transposed(model.hf, name) else 1
            mask.index_fill_(axis, frozen.to(mask.device), False)
        elif name in inside:
            size = parameter.detach().abs().flatten()
            mask.view(-1)[size.topk(int(_SHARE * len(size))).indices] = False
        masks[name] = mask
    return Trainable.of_entries(model, masks)


def column_importance(
    model: HookedModel, data: Encoded, *, seed: int = 0
) -> dict[str, Float[Tensor, " column"]]:
    """How much every column of every weight matrix in the layers matters for some examples.

    Returns:
        Of each matrix, by the parameter's name, ‖W_j‖ · ‖x_j‖ for every column j, with x_j what it
        reads at all positions of all examples that are no padding.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    chosen = data.take(sorted(order[:_MAX_EXAMPLES].tolist()))
    squares: dict[str, Tensor] = {}
    names = _in_layers(model)
    maps = {
        f"{path}.weight": module
        for path, module in model.hf.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{path}.weight" in names
    }
    with torch.no_grad():
        for _, batch in chosen.batches(16, model.device):
            with _reading(maps, squares, batch.attention_mask):
                batch.readout.losses(model, batch, model.hf)
    found = {}
    for name, module in maps.items():
        if name in squares:
            weight: Tensor = module.weight.detach().float()
            norms = weight.norm(dim=1 if isinstance(module, Conv1D) else 0)
            found[name] = norms * squares[name].sqrt()
    return found


@contextmanager
def _reading(maps: dict[str, Any], squares: dict[str, Tensor], mask: Tensor) -> Iterator[None]:
    """Add the squares of what maps read to ``squares``."""

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            if x.shape[:2] == mask.shape:
                x = x * mask.to(x)[..., None]
            total = x.square().flatten(0, -2).sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_layers(model: HookedModel) -> set[str]:
    """Names of parameters in layers: not the embeddings, not the head."""
    from circuitlens.adapt.headslice.geometry import anatomy_of

    anatomy = anatomy_of(model.hf)
    return {n for n, _ in model.hf.named_parameters() if anatomy.layer_of(n) is not None}


def _is_transposed(hf: nn.Module, name: str) -> bool:
    return isinstance(hf.get_submodule(name.rpartition(".")[0]), Conv1D)


def trained_first(model: HookedModel, choice: Choice) -> Trainable:
    """Train all weights on the target once, to see what moves; ``model`` stays as it is.

    Raises:
        InputError: if it is not said how to train.
    """
    from circuitlens.adapt.training import train

    if choice.training is None:
        raise InputError("This strategy trains first to see what moves: pass training=….")
    first = everything(model, choice, None)
    train(
        first.model,
        choice.target,
        None,
        replace(choice.training, seed=choice.seed),
        trainable=first,
        checkpoints=choice.checkpoints,
        quiet=True,
    )
    return first


def lottery(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """Train all weights once, then choose the entries that moved most."""
    first = trained_first(model, choice)
    before = dict(model.hf.named_parameters())
    norms = set(norm_parameters(model.hf))
    moved = {
        name: (p.detach() - before[name].detach().to(p)).abs()
        for name, p in first.model.hf.named_parameters()
        if name not in norms
    }
    budget = slice_entries(model, choice)
    masks = _largest(moved, budget)
    for name in norms:
        masks[name] = torch.ones_like(before[name], dtype=torch.bool)
    return Trainable.of_entries(model, masks)


def _largest(values: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Masks of the ``budget`` largest values of all tensors together, where there are any."""
    found: list[tuple[Tensor, str, Tensor]] = []
    for name, value in values.items():
        top = value.flatten().topk(min(budget, value.numel()))
        found.append((top.values.cpu(), name, top.indices))
    every = torch.cat([top for top, _, _ in found])
    owner = torch.cat([torch.full((len(t),), i) for i, (t, _, _) in enumerate(found)])
    place = torch.cat([torch.arange(len(t)) for t, _, _ in found])
    best = every.topk(min(budget, len(every))).indices
    masks = {}
    for i, (_, name, indices) in enumerate(found):
        mine = place[best[owner[best] == i]]
        if len(mine):
            mask = torch.zeros_like(values[name], dtype=torch.bool)
            mask.view(-1)[indices[mine.to(indices.device)]] = True
            masks[name] = mask
    return masks
