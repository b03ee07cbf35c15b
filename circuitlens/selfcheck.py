"""A check of the hooks of models that are of no tested type."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlens.batch import Batch
from circuitlens.bridging import first_line
from circuitlens.errors import UnsupportedModelError
from circuitlens.families import tested_types
from circuitlens.hooks import pattern_hook, read_values, recording, value_hook

if TYPE_CHECKING:
    from circuitlens.model import HookedModel

__all__ = ["check_hooks"]

_PADDING = 2


def check_hooks(model: HookedModel) -> None:
    """Make sure, on six random tokens and on four, that hooks do what every method relies on.

    * The hooked view gives Hugging Face's logits, and padding does not change them.
    * Heads' outputs are z = A·v, and what replaces them reaches the logits.
    * There are hooks round every activation function.

    Raises:
        UnsupportedModelError: naming the model's type, the tested ones and what is wrong.
    """
    cause: Exception | None = None
    try:
        fault = _fault(model)
    except Exception as error:
        fault, cause = first_line(error), error
    if fault is not None:
        raise UnsupportedModelError(
            f"{type(model.hf).__name__} is of the type {model.hf.config.model_type}, which is none "
            f"of those that circuitlens is tested on ({tested_types()}), and it failed the check "
            f"of its hooks: {fault}."
        ) from cause


@torch.no_grad()
def _fault(model: HookedModel) -> str | None:
    """What is wrong, if something is."""
    layers = range(model.geometry.n_layers)
    for site in model.family.activations(len(layers), model.bridge.hook_dict):
        for hook in (site.post, site.up):
            if hook not in model.bridge.hook_dict:
                return f"there is no hook {hook}"
    batch = _random_batch(model)
    names = [(pattern_hook(n), value_hook(n), model.z_hook(n)) for n in layers]
    hooks, seen = recording(chain.from_iterable(names))
    logits = model.logits(batch, hooks)
    if not _close(logits, model.hf_logits(batch)):
        return "the hooked view does not give the logits of Hugging Face"
    if not _close(logits[1:], model.logits(model.unlabelled(batch.input_ids[1:, _PADDING:]))):
        return "padding changes the logits"
    tokens = batch.attention_mask.bool()
    for layer, (pattern, v, z) in enumerate(names):
        read = read_values(seen[pattern], seen[v], seen[z].shape[-1])
        if not _close(read[tokens], seen[z][tokens]):
            return f"{z} is not the pattern times the values"
        if torch.equal(model.logits(batch, {z: torch.zeros_like}), logits):
            return f"replacing the outputs of the heads of layer {layer} changes nothing"
    return None


def _random_batch(model: HookedModel) -> Batch:
    """Two prompts, the second one padded."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.hf.config.get_text_config().vocab_size
    batch = model.unlabelled(torch.randint(vocabulary, (2, 6), generator=generator))
    batch.attention_mask[1, :_PADDING] = 0
    return batch


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether half of the digits agree; norms and softmax are in float32 even in float64 models."""
    tolerance = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    # Not the negation of ">": NaN is not close to anything.
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
