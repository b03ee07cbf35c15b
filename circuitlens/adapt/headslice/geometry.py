"""Where heads and norms are in a plain Hugging Face model.

An adapter is also loaded where nothing is analysed, so this takes neither the hooked view nor its
library. Names and sizes are read off a skeleton, the same architecture without weights: the model
itself may be quantised, or hold another adapter already.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from circuitlens.errors import UnsupportedModelError
from circuitlens.models.geometry import HeadGeometry, norm_parameters

__all__ = ["Anatomy", "anatomy_of", "geometry_of"]


@dataclass(frozen=True)
class Anatomy:
    """What an adapter must know of a model.

    Attributes:
        geometry: the weight slices of the heads.
        layers: module path of every layer.
        norms: names of the parameters of the norms of the residual stream.
        qk_norms: names of the parameters of the norms of queries and keys.
    """

    geometry: HeadGeometry
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    qk_norms: tuple[str, ...]

    def layer_of(self, parameter: str) -> int | None:
        """Index of the layer that holds a parameter; ``None`` outside of the layers."""
        for index, layer in enumerate(self.layers):
            if parameter.startswith(f"{layer}."):
                return index
        return None


def geometry_of(hf: nn.Module) -> HeadGeometry:
    """The weight slices of the heads of a Hugging Face model, adapted or not.

    Raises:
        UnsupportedModelError: if heads cannot be told apart.
    """
    return anatomy_of(hf).geometry


def anatomy_of(hf: nn.Module) -> Anatomy:
    """Find the heads and norms of a Hugging Face model, adapted or not.

    Raises:
        UnsupportedModelError: for another kind of model, or if heads cannot be told apart or
            do not have their own weights.
    """
    if not isinstance(hf, PreTrainedModel):
        raise UnsupportedModelError(
            f"The head-slice adapter needs a Hugging Face model, but got a {type(hf).__name__}."
        )
    skeleton = _skeleton(hf)
    config = hf.config.get_text_config()
    attention = _attention_modules(skeleton)
    if len(attention) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(hf).__name__} has {len(attention)} attention modules for "
            f"{config.num_hidden_layers} layers, so heads do not have their own weights: the "
            "head-slice adapter needs a model with one attention module in each layer."
        )
    n_heads = config.num_attention_heads
    first = skeleton.get_submodule(attention[0])
    geometry = HeadGeometry(
        skeleton,
        attention,
        n_heads=n_heads,
        # Falcon's configuration has a number that does not hold for all of its variants.
        n_kv_heads=getattr(first, "num_kv_heads", None)
        or getattr(config, "num_key_value_heads", None)
        or n_heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_model=config.hidden_size,
    )
    norms = norm_parameters(skeleton)
    return Anatomy(
        geometry,
        tuple(name.rpartition(".")[0] for name in attention),
        tuple(norms),
        tuple(_inner_norms(skeleton, attention, set(norms))),
    )


def _skeleton(hf: PreTrainedModel) -> PreTrainedModel:
    # Building a model writes its choice of attention into the configuration.
    config = copy.deepcopy(hf.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return type(hf)(config)


def _attention_modules(skeleton: nn.Module) -> list[str]:
    """Paths of the outermost attention modules (BERT's hold another one)."""
    found: list[str] = []
    for path, module in skeleton.named_modules():
        inside = found and path.startswith(f"{found[-1]}.")
        if not inside and "attention" in type(module).__name__.lower():
            found.append(path)
    return found


def _inner_norms(skeleton: nn.Module, attention: list[str], outer: set[str]) -> list[str]:
    """Parameters of norms in attention modules that are not on the residual stream."""
    return [
        name
        for path in attention
        for child, module in skeleton.get_submodule(path).named_modules(prefix=path)
        if "norm" in type(module).__name__.lower()
        for parameter, _ in module.named_parameters(recurse=False)
        if (name := f"{child}.{parameter}") not in outer
    ]
