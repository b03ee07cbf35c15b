"""Neurons of MLPs as nodes: where they are, and their label-balanced means.

A neuron is an entry of what the output map of an MLP reads: the activation, times the linear part
where the MLP is gated.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline, examples_by_id
from circuitlens.errors import UnsupportedModelError
from circuitlens.label_sums import LabelSums
from circuitlens.models.families import ActivationSite
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import recording
from circuitlens.tasks import Task
from circuitlens.utils.processes import mine

__all__ = ["neuron_hook", "neuron_means", "neuron_site"]


def neuron_hook(model: HookedModel, layer: int) -> str:
    """Name of the hook at the neurons of a layer.

    Raises:
        UnsupportedModelError: as :func:`neuron_site`.
    """
    return neuron_site(model, layer).post


def neuron_site(model: HookedModel, layer: int) -> ActivationSite:
    """Names of the hooks around the neurons of a layer.

    Raises:
        UnsupportedModelError: for a mixture of experts, or an MLP without such a hook.
    """
    found = [s for s in model.activations() if s.post.startswith(f"blocks.{layer}.")]
    post = found[0].post if len(found) == 1 else ""
    if not post or "expert" in post or post not in model.bridge.hook_dict:
        raise UnsupportedModelError(
            f"{type(model.hf).__name__} has no single row of neurons in layer {layer} (a mixture "
            "of experts, or an MLP without a hook at its activation): score heads and MLPs instead."
        )
    return found[0]


@torch.no_grad()
def neuron_means(
    model: HookedModel, task: Task, baseline: MeanBaseline, *, batch_size: int = 32
) -> Float[Tensor, "layer neuron"]:
    """Means of all neurons over the examples of a baseline, taken as it takes them.

    Args:
        model: the model of the baseline.
        task: its task.
        baseline: gives the examples, positions and whether labels count the same.
        batch_size: examples per forward pass; the result does not depend on it.

    Returns:
        In at least float32, on the model's device.

    Raises:
        UnsupportedModelError: as :func:`neuron_hook`.
    """
    baseline.check_constant("A circuit of neurons")
    names = [neuron_hook(model, layer) for layer in range(model.geometry.n_layers)]
    by_id = examples_by_id(task)
    encoded = task.encode(model, [by_id[i] for i in baseline.example_ids])
    sums: LabelSums | None = None
    for _, batch in mine(encoded.batches(batch_size, model.device), model.device):
        hooks, found = recording(names)
        model.label_logits(batch, hooks)
        outputs = [(found[name],) for name in names]
        if sums is None:
            sums = LabelSums(model, len(task.labels), 0, outputs[0][0].shape[-1])
        everything = torch.ones(len(batch), dtype=torch.bool, device=model.device)
        sums.add(outputs, batch, batch.once(batch.mask(baseline.positions)), everything)
    assert sums is not None
    sums.share(model.device)
    means, _ = sums.means(balanced=baseline.reference == "label-balanced")
    scale = 0.0 if baseline.reference == "zero" else 1.0
    return (scale * means).to(torch.promote_types(model.dtype, torch.float32))
