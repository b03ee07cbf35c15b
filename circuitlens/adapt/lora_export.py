"""Head slices as a plain LoRA adapter, which any tool that reads PEFT's files can use.

What training adds to rows of q, k and v, or to columns of o, is a matrix that is zero elsewhere. As
a product B·A it needs no approximation: of n rows, A holds what is added and B puts row i where it
belongs; of n columns, A picks what the columns read and B holds what is added. The rank is the
number of rows or columns, k · d_head for k heads, or that of the whole matrix, if it is smaller.

LoRA has no place for norms and biases. PEFT can save them alongside (``modules_to_save``,
``lora_bias``), which few serving engines read; else they are left out, and the model differs by
as much.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.adapt.trainable import Trainable
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel

__all__ = ["LoraExport", "write_lora"]


@dataclass(frozen=True)
class LoraExport:
    """What was written as LoRA, and what was not.

    Attributes:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        ranks: rank of every module.
        beside: parameters that PEFT saves alongside the factors: norms, biases.
        left_out: parameters that were trained and are not in the files.
    """

    folder: Path
    ranks: Mapping[str, int]
    beside: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the adapter is all that was trained."""
        return not self.left_out


@torch.no_grad()
def write_lora(
    trainable: Trainable, base: HookedModel, folder: Path, *, beside: bool
) -> LoraExport:
    """Write an adapter on slices of heads as a LoRA adapter.

    Args:
        trainable: with the adapter.
        base: the model that it belongs to; left as it is.
        folder: created.
        beside: save norms and biases alongside the factors; else they are left out.

    Raises:
        InputError: if the adapter is of another method, or has no slices at all.
    """
    from peft import LoraConfig, get_peft_model

    from circuitlens.adapt.headslice.layer import HeadSliceLayer, HeadSliceNorm

    adapter = trainable.adapter
    if adapter is None or not hasattr(adapter.base_model, "_check_layers"):
        raise InputError(
            "Only adapters on slices of heads become LoRA: this one is of another method, or the "
            "weights themselves were trained."
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    norms: dict[str, HeadSliceNorm] = {}
    for path, module in adapter.base_model.model.named_modules():
        if not isinstance(module, HeadSliceLayer):
            continue
        if isinstance(module, HeadSliceNorm):
            norms[path] = module
            continue
        found = _factors(module)
        if found is not None:
            factors[path] = found
        bias = _added_bias(module)
        if bias is not None:
            biases[path] = bias
    if not factors:
        raise InputError(
            "The adapter has no slices of heads, so there is nothing for LoRA to hold."
        )
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    escaped = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
    with_bias = beside and bool(biases)
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=escaped,
        alpha_pattern=escaped,
        fan_in_fan_out=_conv1d(base, ranks),
        modules_to_save=list(norms) if beside and norms else None,
        lora_bias=with_bias,
        task_type=base.readout.peft_task_type(),
    )
    copy = base.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        # Where a map has no bias, it gets one that is not merged; the result says so.
        warnings.filterwarnings("ignore", message="`lora_bias=True`")
        made: Any = get_peft_model(cast(Any, copy.hf), config)
    modules = dict(made.base_model.model.named_modules())
    for path, (a, b) in factors.items():
        layer: Any = modules[path]
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        if with_bias:
            bias = biases.get(path)
            layer.lora_B["default"].bias.copy_(torch.zeros_like(b[:, 0]) if bias is None else bias)
    if beside:
        for path, norm in norms.items():
            saved = modules[path].modules_to_save["default"].float()
            saved.weight.copy_(norm.weight)
            if norm.bias is not None:
                saved.bias.copy_(norm.bias)
    copy.adapter = made
    copy.prompt = trainable.model.prompt
    # Where the weights are is recorded as for any other adapter.
    Trainable(copy, base=trainable.base).write(folder)
    rest = [f"{path}.weight" for path in norms] + [f"{path}.bias" for path in biases]
    if beside:
        return LoraExport(folder, ranks, tuple(rest), ())
    return LoraExport(folder, ranks, (), tuple(rest))


def _factors(module: Any) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]] | None:
    """A and B of what an adapter adds to the weight of a map; ``None`` if it adds nothing."""
    from circuitlens.adapt.headslice.layer import HeadSliceOutputs, HeadSliceRows

    index = module.headslice_index["default"]
    if isinstance(module, HeadSliceOutputs):
        if "default" not in module.headslice_weight:
            return None
        added = module.columns().float() * module._factors("default")
    else:
        added = module.headslice_weight["default"].float()
    one = torch.zeros(
        len(index), module.out_features if isinstance(module, HeadSliceRows) else module.in_features
    ).to(added)
    one[torch.arange(len(index)), index] = 1.0
    if not isinstance(module, HeadSliceRows):
        a, b = one, added
    else:
        a, b = added, one.T
    # More rows than the matrix has columns, or the other way about.
    if len(index) > min(module.in_features, module.out_features):
        product = b @ a
        if module.in_features <= module.out_features:
            a, b = torch.eye(module.in_features).to(product), product
        else:
            a, b = product, torch.eye(module.out_features).to(product)
    return a, b


def _added_bias(module: Any) -> Float[Tensor, " d_out"] | None:
    """What an adapter adds to what a map gives, whatever it reads."""
    from circuitlens.adapt.headslice.layer import HeadSliceOutputs

    if "default" not in module.headslice_bias:
        return None
    leaf = module.headslice_bias["default"].float()
    if isinstance(module, HeadSliceOutputs):
        return cast(Tensor, module.columns().float() @ leaf)
    whole = torch.zeros(module.out_features).to(leaf)
    whole[module.headslice_index["default"]] = leaf
    return whole


def _conv1d(model: HookedModel, paths: Mapping[str, int]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(model.hf.get_submodule(path), Conv1D) for path in paths)
