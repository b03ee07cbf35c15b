"""Makers of what is trained: adapters on slices of heads, LoRA, any method of PEFT, weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from circuitlens.adapt.choice import Choice
from circuitlens.adapt.trainable import Trainable, merged_copy
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError, first_line
from circuitlens.models.geometry import norm_parameters
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head

if TYPE_CHECKING:
    from circuitlens.adapt.headslice import HeadSliceConfig

__all__ = [
    "Maker",
    "by_peft",
    "circuit_lora",
    "everything",
    "label_rows",
    "lora_of_rank",
    "of_outputs",
    "slice_entries",
    "slices",
]

Maker = Callable[[HookedModel, Choice, Circuit | None], Trainable]


def _slice_config(choice: Choice, heads: Circuit | None) -> HeadSliceConfig:
    from circuitlens.adapt.headslice import HeadSliceConfig

    return HeadSliceConfig(
        heads=tuple(map(str, heads or ())), kv_policy=choice.kv_policy, norms="all"
    )


def slices(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """Slices of heads, and all norms."""
    return Trainable.of_adapter(model, _slice_config(choice, heads), choice.seed)


def of_outputs(kind: str) -> Maker:
    """Make a factor (``"scale"``) or a vector (``"offset"``) of each head's output, nothing else.

    Without heads all are meant.
    """

    def make(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
        from circuitlens.adapt.headslice import HeadSliceConfig

        chosen = model.geometry if heads is None else heads
        config = HeadSliceConfig(heads=tuple(chosen), projections=(), outputs=(kind,), norms="none")
        return Trainable.of_adapter(model, config, choice.seed)

    return make


def everything(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """All weights."""
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.hf.named_parameters()}
    return Trainable.of_entries(model, masks)


def label_rows(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """What of the model's head belongs to the labels."""
    assert choice.readout is not None
    return Trainable.of_entries(model, choice.readout.head_masks(model.hf))


def by_peft(config: Any) -> Maker:
    """Make whatever a configuration of PEFT says, if it starts from the model and can be merged."""

    def make(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
        method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        # PEFT writes into configurations, and a comparison uses one several times.
        own = copy.deepcopy(config)
        try:
            trainable = replace(Trainable.of_adapter(model, own, choice.seed), any_method=True)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError) as error:
            raise InputError(
                f"PEFT's {method} does not fit {model.name}: {first_line(error)}"
            ) from error
        _check_begins_at_the_model(model, trainable, method)
        return trainable

    return make


@torch.no_grad()
def _check_begins_at_the_model(model: HookedModel, trainable: Trainable, method: str) -> None:
    """Reject an adapter without which the model is another one.

    Raises:
        InputError: saying why.
    """
    weights = dict(model.hf.named_parameters())
    for path, module in trainable.adapter.base_model.model.named_modules():
        base = getattr(module, "base_layer", None)
        own = weights.get(f"{path}.weight")
        if base is None or own is None:
            continue
        if not torch.equal(base.weight, own):
            raise InputError(
                f"PEFT's {method}, as configured, changes the weights that it is added to "
                f"({path}), so that on the model itself it would be wrong: choose another "
                "initialisation."
            )
        try:
            begun = merged_copy(module).weight
        except Exception as error:
            raise InputError(
                f"PEFT's {method} cannot be merged into {path} ({first_line(error)}): choose a "
                "method that can."
            ) from error
        off = (begun - own).abs().max()
        if off > 1e-5 * own.abs().max():
            raise InputError(
                f"PEFT's {method}, as configured, starts from weights that are not the model's "
                f"({path} differs by {float(off):.2g}): choose an initialisation that changes "
                "nothing before training."
            )


def lora_of_rank(rank: int | None, *, norms: bool = False) -> Maker:
    """LoRA on all attention projections; without a rank, as many entries as the circuit has."""

    def make(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
        modules = [
            m for layer in range(model.geometry.n_layers) for m in _projections(model, layer)
        ]
        budget = slice_entries(model, choice)
        each = sum(_width(model, module) for module in modules)
        ranks = dict.fromkeys(modules, rank or max(1, round(budget / each)))
        return _lora(model, ranks, choice.seed, norms=norms)

    return make


def circuit_lora(
    weigh: Callable[[HookedModel, Choice], Mapping[int, float]],
) -> Maker:
    """LoRA on some layers, ranks by their weights, with the circuit's size in all."""

    def make(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
        weight = {layer: gain for layer, gain in weigh(model, choice).items() if gain > 0}
        total = sum(weight.values())
        if total <= 0:
            raise InputError(
                "No head of the circuit has a positive score, so ranks cannot follow relevance: "
                "choose another circuit or strategy='lora'."
            )
        budget = slice_entries(model, choice)
        ranks: dict[str, int] = {}
        for layer, gain in weight.items():
            modules = _projections(model, layer)
            each = sum(_width(model, module) for module in modules)
            ranks |= dict.fromkeys(modules, max(1, round(budget * gain / total / each)))
        return _lora(model, ranks, choice.seed)

    return make


def slice_entries(model: HookedModel, choice: Choice) -> int:
    """Entries of the slices that ``circuit`` would train under the same key/value policy."""
    from circuitlens.adapt.headslice import selected_slices

    parameters = dict(model.hf.named_parameters())
    pieces = selected_slices(model.geometry, _slice_config(choice, choice.circuit))
    return sum(piece.of(parameters[piece.parameter]).numel() for piece in pieces)


def _lora(
    model: HookedModel, ranks: dict[str, int], seed: int, *, norms: bool = False
) -> Trainable:
    """LoRA on named modules, each with its rank; alpha is twice the rank. And, perhaps, norms."""
    from peft import LoraConfig

    # Peft reads keys of its patterns as regular expressions behind a dot.
    escaped = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=list(ranks),
        rank_pattern=escaped,
        alpha_pattern={name: 2 * rank for name, rank in escaped.items()},
        fan_in_fan_out=_transposed(model),
        modules_to_save=_norms(model) if norms else None,
    )
    return Trainable.of_adapter(model, config, seed)


def _norms(model: HookedModel) -> list[str]:
    """Modules that are norms of the residual stream."""
    return list(dict.fromkeys(n.rpartition(".")[0] for n in norm_parameters(model.hf)))


def _transposed(model: HookedModel) -> bool:
    return type(model.hf).__name__.startswith("GPT2")


def _projections(model: HookedModel, layer: int) -> list[str]:
    """Modules of a layer's q, k, v and o, each once."""
    pieces = model.geometry.slices(Head(layer, 0))
    return list(dict.fromkeys(s.parameter.rsplit(".", 1)[0] for s in pieces))


def _width(model: HookedModel, module: str) -> int:
    """Entries that one rank of LoRA adds to a module."""
    return sum(model.hf.get_submodule(module).weight.shape)
