"""Entries of the weights that belong to neurons of MLPs, and the strategy that trains them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from circuitlens.adapt.choice import Choice
from circuitlens.adapt.makers import slice_entries
from circuitlens.adapt.selections import MAX_EXAMPLES
from circuitlens.adapt.trainable import Trainable
from circuitlens.baseline import label_balanced_mean
from circuitlens.circuit import Circuit
from circuitlens.errors import UnsupportedModelError
from circuitlens.models.geometry import norm_parameters
from circuitlens.models.hooked import HookedModel
from circuitlens.neurons import neuron_site
from circuitlens.nodes import Neuron
from circuitlens.scoring.score_neurons import neuron_relevance

__all__ = ["neuron_masks", "relevant_neurons"]


def neuron_masks(
    model: HookedModel, neurons: Iterable[Neuron]
) -> dict[str, Bool[Tensor, "*shape"]]:
    """Entries of neurons: their rows of the maps into the MLP, and their columns of the map out.

    Args:
        model: the model.
        neurons: of its MLPs.

    Returns:
        Masks by the parameter's name, biases of the maps into the MLP among them.

    Raises:
        UnsupportedModelError: for a mixture of experts, or maps that are not parameters.
    """
    by_layer: dict[int, list[int]] = {}
    for neuron in neurons:
        by_layer.setdefault(neuron.layer, []).append(neuron.index)
    masks: dict[str, Tensor] = {}
    # The hooked view has views of the parameters, parts of them where maps are fused.
    stored = {p.untyped_storage().data_ptr(): (n, p) for n, p in model.hf.named_parameters()}
    for layer, indices in sorted(by_layer.items()):
        site = neuron_site(model, layer)
        for hook in (site.up, site.gate, site.post):
            if hook is None:
                continue
            inward = hook is not site.post
            part = hook.split(".")[-2]
            module = getattr(
                getattr(model.bridge.blocks[layer].mlp, part, None), "original_component", None
            )
            weight = getattr(module, "weight", None)
            if weight is None or weight.untyped_storage().data_ptr() not in stored:
                raise UnsupportedModelError(
                    f"The maps of the neurons in layer {layer} of {type(model.hf).__name__} are "
                    "not separate parameters, so neurons cannot be trained: train heads."
                )
            transposed = isinstance(module, Conv1D)
            axis = int(transposed) if inward else 1 - int(transposed)
            _mark(masks, stored, weight, axis, indices)
            bias = getattr(module, "bias", None)
            if inward and bias is not None:
                _mark(masks, stored, bias, 0, indices)
    return masks


def _mark(
    masks: dict[str, Tensor],
    stored: dict[int, tuple[str, torch.nn.Parameter]],
    view: Tensor,
    axis: int,
    indices: list[int],
) -> None:
    name, parameter = stored[view.untyped_storage().data_ptr()]
    if name not in masks:
        masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
    offset = view.storage_offset() - parameter.storage_offset()
    seen = torch.as_strided(masks[name], view.shape, view.stride(), offset)
    seen.index_fill_(axis, torch.tensor(indices, device=seen.device), True)


def relevant_neurons(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """The neurons with the largest relevance in the source, with as many entries as the circuit.

    Raises:
        InputError: if there is no source task.
        UnsupportedModelError: as :func:`neuron_masks`.
    """
    source = choice.known
    positions = "all" if choice.scores is None else choice.scores.positions
    baseline = label_balanced_mean(
        model, source, positions=positions, allow_chance=True, quiet=True
    )
    scores = neuron_relevance(
        model,
        source,
        baseline,
        max_examples=MAX_EXAMPLES,
        seed=choice.seed,
        quiet=True,
    )
    each = sum(int(mask.sum()) for mask in neuron_masks(model, [Neuron(0, 0)]).values())
    count = max(1, min(len(scores.grid), slice_entries(model, choice) // each))
    masks = neuron_masks(model, [n for n in scores.top(count) if isinstance(n, Neuron)])
    everything = dict(model.hf.named_parameters())
    for name in norm_parameters(model.hf):
        masks[name] = torch.ones_like(everything[name], dtype=torch.bool)
    return Trainable.of_entries(model, masks)
