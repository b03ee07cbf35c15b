"""Leaves around projections and norms.

A leaf is what training adds to some entries of a frozen parameter; it begins at zero. Leaves of
projections act in activation space, so that neither a full weight nor its gradient is ever made:

    rows of q, k, v    y = W x + b;  y[rows] += L x + l
    columns of o       y = W x + b + L x[columns]
    outputs of heads   y = W x' + b with x'[columns] = (1 + l) x[columns] + m, one number l per head
    norms              the norm's own code, run with weight + l, in at least float32

Gradients of leaves are those of the entries they stand for, so training leaves is training slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

from circuitlens.adapt.headslice.selection import Target
from circuitlens.errors import InputError

__all__ = [
    "HeadSliceColumns",
    "HeadSliceLayer",
    "HeadSliceNorm",
    "HeadSliceOutputs",
    "HeadSliceRows",
    "layer_for",
    "layer_type",
]


@dataclass(frozen=True)
class _Region:
    """A leaf and the entries of a parameter that it is added to; without index, all of them."""

    parameter: str
    dim: int
    index: Tensor | None
    leaf: Tensor

    def entries(self, tensor: Tensor) -> Tensor:
        return tensor if self.index is None else tensor.index_select(self.dim, self.index)

    def sum(self, tensor: Tensor) -> Tensor:
        """The entries plus the leaf, added up in the leaf's type and rounded once."""
        return (self.entries(tensor).to(self.leaf.dtype) + self.leaf).to(tensor.dtype)

    @torch.no_grad()
    def write(self, tensor: Tensor, values: Tensor) -> None:
        if self.index is None:
            tensor.copy_(values)
        else:
            # The model may have moved since it was merged.
            index, values = self.index.to(tensor.device), values.to(tensor.device)
            tensor.index_copy_(self.dim, index, values)


class HeadSliceLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module and the leaves of its adapters.

    Reading ``weight`` or ``bias`` gives what acts at the moment, leaves included.
    """

    adapter_layer_names = ("headslice_weight", "headslice_bias")
    other_param_names = ("headslice_index",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.headslice_weight = nn.ParameterDict()
        self.headslice_bias = nn.ParameterDict()
        self.headslice_index = BufferDict(persistent=False)
        self.merged_adapters: list[str] = []
        # What merging has overwritten: subtracting again would not give the same bits.
        self._overwritten: list[tuple[_Region, Tensor]] = []

    def add_adapter(self, name: str, target: Target) -> None:
        """Make leaves of zeros for one more adapter."""
        # Some quantised layers have buffers only.
        stored = next(chain(self.base_layer.parameters(), self.base_layer.buffers()))
        # At least float32: AdamW's small steps are lost in bfloat16.
        wider = torch.promote_types(stored.dtype, torch.float32)
        dtype = wider if stored.dtype.is_floating_point else torch.float32
        options: dict[str, Any] = {"device": stored.device, "dtype": dtype}
        if target.index:
            self.headslice_index[name] = torch.tensor(target.index, device=stored.device)
        weight, bias = self._leaf_shapes(target)
        if weight is not None:
            self.headslice_weight[name] = nn.Parameter(torch.zeros(weight, **options))
        if target.bias:
            self.headslice_bias[name] = nn.Parameter(torch.zeros(bias, **options))

    def _leaf_shapes(self, target: Target) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        """Shapes of the leaves of weight and bias, each perhaps without use."""
        raise NotImplementedError

    def _has(self, adapter: str) -> bool:
        """Whether an adapter has leaves here."""
        return adapter in self.headslice_weight or adapter in self.headslice_bias

    def _regions(self, adapter: str) -> Iterator[_Region]:
        """The leaves of an adapter, laid out as in the parameters of the base."""
        raise NotImplementedError

    def _adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Forward pass with the leaves of ``adapters``."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "*batch d_in"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*batch d_out"]:
        """Run the module with the leaves of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._acting_adapters()
        if not adapters:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return self._adapted(x, adapters, *args, **kwargs)

    def _acting_adapters(self) -> list[str]:
        """Active adapters with leaves here that are not merged."""
        if self.disable_adapters or self.merged:
            return []
        active = cast("list[str]", self.active_adapters)
        return [name for name in active if self._has(name)]

    @property
    def weight(self) -> Tensor:
        """The effective weight."""
        return cast(Tensor, self._acting("weight"))

    @property
    def bias(self) -> Tensor | None:
        """The effective bias."""
        return self._acting("bias")

    def _acting(self, parameter: str) -> Tensor | None:
        value = cast("Tensor | None", getattr(self.base_layer, parameter, None))
        for adapter in self._acting_adapters():
            for region in self._regions(adapter):
                if region.parameter == parameter and value is not None:
                    total = region.sum(value)
                    value = (
                        total
                        if region.index is None
                        else value.index_copy(region.dim, region.index, total)
                    )
        return value

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add leaves to the base's parameters in place; the sum is made in at least float32.

        Args:
            safe_merge: look for infinities and NaN before anything is written.
            adapter_names: by default, the active ones.

        Raises:
            InputError: if ``safe_merge`` finds any.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self._has(adapter):
                continue
            sums = self._sums(adapter)
            if safe_merge:
                _check_finite(adapter, sums)
            for region, parameter, total in sums:
                self._overwritten.append((region, region.entries(parameter).clone()))
                region.write(parameter, total)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None, *, finite: bool = False) -> None:
        """Reject a merge that is not possible, before anything is written anywhere.

        Raises:
            InputError: saying why.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if self._has(adapter) and finite:
                _check_finite(adapter, self._sums(adapter))

    def _sums(self, adapter: str) -> list[tuple[_Region, Tensor, Tensor]]:
        """The regions of an adapter, the parameters that they are in, and what merging writes."""
        found = [(r, getattr(self.base_layer, r.parameter)) for r in self._regions(adapter)]
        return [(region, parameter, region.sum(parameter)) for region, parameter in found]

    def unmerge(self) -> None:
        """Put back what merging has overwritten, to the bit."""
        while self._overwritten:
            region, before = self._overwritten.pop()
            region.write(getattr(self.base_layer, region.parameter), before)
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own would give the leaves the base's type as well.
        target = device or cast(Any, self.base_layer).weight.device
        for leaves in (self.headslice_weight, self.headslice_bias):
            if adapter_name in leaves and not leaves[adapter_name].is_meta:
                leaves[adapter_name].data = leaves[adapter_name].data.to(target)


class _Projection(HeadSliceLayer):
    """A linear map, stored as (out, in) by ``Linear`` and as (in, out) by ``Conv1D``."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._transposed = isinstance(base_layer, Conv1D)
        if self._transposed:
            self.in_features, self.out_features = cast(Any, base_layer).weight.shape
        else:
            # Not the weight's shape: 4-bit weights are packed.
            self.in_features = cast(Any, base_layer).in_features
            self.out_features = cast(Any, base_layer).out_features

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Autocast chooses a type by itself.
        if not torch.is_autocast_enabled(x.device.type):
            x = cast(Tensor, cast(Any, self)._cast_input_dtype(x, weight.dtype))
        return F.linear(x, weight, bias)

    def _region(self, parameter: str, dim: int, adapter: str, leaf: Tensor) -> _Region:
        if leaf.ndim == 2 and self._transposed:
            dim, leaf = 1 - dim, leaf.T
        return _Region(parameter, dim, self.headslice_index[adapter], leaf)


class HeadSliceOutputs(_Projection):
    """The map W_O, and leaves for what some heads give it.

    Leaves: weight ``head`` (a factor less 1), bias ``head · d_head`` (a vector that is added).
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._heads: dict[str, int] = {}

    def add_adapter(self, name: str, target: Target) -> None:
        """Make leaves of zeros for one more adapter."""
        self._heads[name] = target.heads
        super().add_adapter(name, target)

    def _leaf_shapes(self, target: Target) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        return (target.heads,) if target.scale else None, (len(target.index),)

    def _factors(self, adapter: str) -> Tensor:
        """What each of the adapter's features is multiplied by, less 1."""
        size = len(self.headslice_index[adapter]) // self._heads[adapter]
        return cast(Tensor, self.headslice_weight[adapter].repeat_interleave(size))

    def columns(self, adapter: str = "default") -> Float[Tensor, "d_out column"]:
        """The columns of the base that an adapter's heads are read by."""
        stored = cast(Tensor, cast(Any, self.base_layer).weight)
        whole = stored.T if self._transposed else stored
        return whole.index_select(1, self.headslice_index[adapter])

    def _regions(self, adapter: str) -> Iterator[_Region]:
        weight = self.columns(adapter)
        if adapter in self.headslice_weight:
            factors = self._factors(adapter)
            yield self._region("weight", 1, adapter, weight.to(factors.dtype) * factors)
        if adapter in self.headslice_bias and cast(Any, self.base_layer).bias is not None:
            vector = self.headslice_bias[adapter]
            yield _Region("bias", 0, None, weight.to(vector.dtype) @ vector)

    def _adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        for name in adapters:
            index = self.headslice_index[name]
            read = x.index_select(-1, index)
            added = torch.zeros_like(read)
            if name in self.headslice_weight:
                added = added + (read * self._factors(name)).to(x.dtype)
            if name in self.headslice_bias:
                added = added + self.headslice_bias[name].to(x.dtype)
            x = x.index_add(-1, index, added)
        return cast(Tensor, self.base_layer(x, *args, **kwargs))

    def drop_vectors(self) -> None:
        """Forget vectors that the base has no bias for."""
        if cast(Any, self.base_layer).bias is None:
            self.headslice_bias = nn.ParameterDict()

    def check_merge(self, adapter_names: list[str] | None = None, *, finite: bool = False) -> None:
        """Refuse to merge vectors where there is no bias to take them."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.headslice_bias and cast(Any, self.base_layer).bias is None:
                raise InputError(
                    f"Adapter {adapter!r} adds vectors to the outputs of heads, and this model's "
                    "W_O has no bias that could take them: keep the adapter alongside the weights."
                )
        super().check_merge(adapter_names, finite=finite)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge, unless a vector has no bias to go to."""
        self.check_merge(adapter_names)
        super().merge(safe_merge, adapter_names)


class HeadSliceRows(_Projection):
    """The map to q, k or v, or to all of them, and leaves for some rows.

    Leaves: weight ``row d_in``, bias ``row``.
    """

    def _leaf_shapes(self, target: Target) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        n = len(target.index)
        return (n, self.in_features), (n,)

    def _regions(self, adapter: str) -> Iterator[_Region]:
        yield self._region("weight", 0, adapter, self.headslice_weight[adapter])
        if adapter in self.headslice_bias:
            yield self._region("bias", 0, adapter, self.headslice_bias[adapter])

    def _adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        for name in adapters:
            added = self._map(x, self.headslice_weight[name], self.headslice_bias.get(name))
            y = y.index_add(-1, self.headslice_index[name], added.to(y.dtype))
        return y


class HeadSliceColumns(_Projection):
    """The map W_O, and leaves for some columns.

    Leaf: weight ``d_model column``.
    """

    def _leaf_shapes(self, target: Target) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        return (self.out_features, len(target.index)), ()

    def _regions(self, adapter: str) -> Iterator[_Region]:
        yield self._region("weight", 1, adapter, self.headslice_weight[adapter])

    def _adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        for name in adapters:
            read = x.index_select(-1, self.headslice_index[name])
            y = y + self._map(read, self.headslice_weight[name]).to(y.dtype)
        return y


class HeadSliceNorm(HeadSliceLayer):
    """A norm, and leaves for its weight and bias.

    The sum acts in the leaf's type: weights near 1 have 8 bits in bfloat16, and a training step
    is smaller than the last of them.
    """

    def _leaf_shapes(self, target: Target) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        size = tuple(cast(Any, self.base_layer).weight.shape)
        return size, size

    def _regions(self, adapter: str) -> Iterator[_Region]:
        yield _Region("weight", 0, None, self.headslice_weight[adapter])
        if adapter in self.headslice_bias:
            yield _Region("bias", 0, None, self.headslice_bias[adapter])

    def _adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        # The family's own forward, whatever it makes of the weight (Gemma: 1 + weight).
        acting = {"weight": self.weight, "bias": self.bias}
        tensors = {name: value for name, value in acting.items() if value is not None}
        stored = cast(Any, self.base_layer).weight.dtype
        wide = tensors["weight"].dtype
        # PyTorch's own kernels take one type; in others, the weight comes after the rounding.
        fused = isinstance(self.base_layer, nn.LayerNorm | nn.RMSNorm)
        given = x.to(wide) if fused and wide != stored else x
        y = torch.func.functional_call(self.base_layer, tensors, (given, *args), kwargs)
        return cast(Tensor, y if wide == stored else y.to(x.dtype))

    def _acting(self, parameter: str) -> Tensor | None:
        value = cast("Tensor | None", getattr(self.base_layer, parameter, None))
        for adapter in self._acting_adapters():
            for region in self._regions(adapter):
                if region.parameter == parameter and value is not None:
                    value = value + region.leaf
        return value


_LAYERS: dict[str, type[HeadSliceLayer]] = {
    "rows": HeadSliceRows,
    "columns": HeadSliceColumns,
    "outputs": HeadSliceOutputs,
    "norm": HeadSliceNorm,
}


def _check_finite(adapter: str, sums: Sequence[tuple[_Region, Tensor, Tensor]]) -> None:
    if not all(bool(total.isfinite().all()) for _, _, total in sums):
        raise InputError(
            f"Merging adapter {adapter!r} would write infinities or NaN: train it again with a "
            "smaller learning rate."
        )


def layer_type(target: Target) -> type[HeadSliceLayer]:
    """What wraps a module for what is trained of it."""
    return _LAYERS[target.kind]


def layer_for(base_layer: nn.Module, target: Target) -> HeadSliceLayer:
    """Wrap a module for what is trained of it; adapters are added afterwards."""
    return _LAYERS[target.kind](base_layer)
