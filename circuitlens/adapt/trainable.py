"""What a strategy trains: an adapter on a copy of the model, or entries of its own weights.

Both offer the same: a copied model that a trainer can run, the trained tensors, and the model that
they make.

What is trained is float32, also where the model is in 16 bits, which would round small steps away.
An adapter's tensors are float32 alongside weights in 16 bits, and stay separate: merging would
round them. A copy whose own entries are trained becomes float32 as a whole.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from circuitlens.adapt.precision import in_16_bits, widen
from circuitlens.adapt.tensor_files import (
    ADAPTER,
    ENTRIES,
    ENTRIES_SCHEMA,
    Trained,
    digest_of_adapter,
)
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.utils.room import writing_to
from circuitlens.utils.storage import read_plain_json, replacing, write_tensors

__all__ = ["PROMPT", "Trainable", "merged_copy", "whole_modules_in_float32"]

# How far half a way may lie from the middle of its ends, as a share of their distance.
_OFF_THE_LINE = 1e-3

# Where an adapter's configuration keeps its prompt, within "auto_mapping".
PROMPT = "circuitlens_prompt"

Masks = Mapping[str, Bool[Tensor, "..."]]


@dataclass(frozen=True)
class Trainable:
    """A copy of a model of which some tensors are trained.

    Attributes:
        model: the copy; the adapter, if there is one, sits inside its Hugging Face view.
        masks: trained entries by parameter name, if there is no adapter.
        base: type of the weights that the tensors belong to, such as ``"bfloat16"``.
        any_method: whether the adapter is of a method of PEFT that nothing is known of.
    """

    model: HookedModel
    masks: Masks | None = None
    base: str = ""
    any_method: bool = False

    @property
    def adapter(self) -> Any:
        """The adapter inside the copy, if there is one."""
        return self.model.adapter

    @classmethod
    def of_entries(cls, model: HookedModel, masks: Masks) -> Trainable:
        """Train entries of the weights by gradient masking."""
        copy = model.clone()
        widen(copy.hf)
        return cls(copy, masks=masks, base=_type_of(model))

    @classmethod
    def of_adapter(cls, model: HookedModel, config: Any, seed: int) -> Trainable:
        """Train a PEFT adapter."""
        from peft import get_peft_model

        copy = model.clone()
        config.task_type = config.task_type or model.readout.peft_task_type()
        own = list(getattr(config, "modules_to_save", None) or ())
        # PEFT writes this into the adapter's configuration as the base to load it with.
        cast(Any, copy.hf).name_or_path = model.name if model.origin == "hub" else ""
        # Some adapters begin at random.
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT asks transformers by a name that is about to change; nothing for users to do.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            torch.manual_seed(seed)
            adapter = get_peft_model(cast(Any, copy.hf), config)
        whole_modules_in_float32(adapter)
        # For classifiers PEFT trains the head besides, whatever the strategy.
        head = {f"{name}." for name in getattr(adapter, "modules_to_save", None) or ()}
        wanted = {f"{name}." for name in own}
        for name, parameter in adapter.named_parameters():
            if any(f".{part}" in name for part in head - wanted):
                parameter.requires_grad_(False)
        copy.adapter = adapter
        return cls(copy, base=_type_of(model))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that hold trained entries, by name."""
        named = dict(self.model.hf.named_parameters())
        if self.masks is not None:
            return {name: named[name] for name in self.masks}
        return {name: p for name, p in named.items() if p.requires_grad}

    @property
    def n_entries(self) -> int:
        """Number of trained entries."""
        if self.masks is not None:
            return sum(int(mask.sum()) for mask in self.masks.values())
        return sum(p.numel() for p in self.parameters.values())

    def state(self) -> dict[str, Tensor]:
        """Copy the trained entries."""
        masks = self.masks or {}
        return {
            name: (p.detach()[masks[name]] if name in masks else p.detach()).clone()
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put trained entries back."""
        masks = self.masks or {}
        for name, parameter in self.parameters.items():
            if name in masks:
                parameter[masks[name]] = state[name].to(parameter)
            else:
                parameter.copy_(state[name])

    def between(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
    ) -> dict[str, Tensor]:
        """Return entries that make the weights W0 + α(W1 - W0), where :meth:`is_line`.

        Where an adapter's layer multiplies tensors of which one is zero at the start, such as the
        second factor of LoRA, only that one is scaled; everything else lies on its own line.

        Args:
            start, end: entries that :meth:`state` returned.
            alpha: 0 is the start, 1 the end.
        """
        if alpha == 1:
            return dict(end)
        whole = set() if self.adapter is None else self._factors(start)
        return {
            name: end[name].clone()
            if alpha > 0 and name in whole
            else start[name].lerp(end[name], alpha)
            for name in end
        }

    def _factors(self, start: Mapping[str, Tensor]) -> set[str]:
        """Tensors of adapter layers next to one that is zero at the start."""
        found: set[str] = set()
        for names in self._layers(start).values():
            zero = {name for name in names if not start[name].any()}
            if zero:
                found |= set(names) - zero
        return found

    def _layers(self, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """Names of the trained tensors of every layer of an adapter."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        modules = self.model.hf.named_modules()
        layers = [
            path
            for path, module in modules
            if isinstance(module, BaseTunerLayer) and not isinstance(module, ModulesToSaveWrapper)
        ]
        found = {path: [n for n in state if n.startswith(f"{path}.")] for path in layers}
        return {path: names for path, names in found.items() if names}

    def is_line(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> bool:
        """Whether :meth:`between` gives the weights on the line from start to end.

        That holds for entries of the weights, LoRA and head slices, and for factors of single
        features. Of other adapters a layer is tried: a rotation, or a weight that is normalised,
        is not scaled by scaling its tensors.
        """
        if self.adapter is None or not self.any_method:
            return True
        moved = [
            path
            for path, names in self._layers(end).items()
            if any(not torch.equal(start[name], end[name]) for name in names)
        ]
        if not moved:
            return True
        found = []
        for alpha in (0.0, 0.5, 1.0):
            self.load(self.between(start, end, alpha))
            layer = merged_copy(self.model.hf.get_submodule(moved[0]))
            found.append(layer.weight.detach().double())
        before, middle, after = found
        off = (middle - (before + after) / 2).norm()
        return bool(off <= _OFF_THE_LINE * (after - before).norm())

    def write(self, folder: Path) -> None:
        """Write the trained tensors: PEFT's files of an adapter, or entries of the weights.

        A note next to them, which :meth:`Trained.found` reads, says what they are.
        """
        if self.adapter is not None:
            with writing_to(folder):
                self.adapter.save_pretrained(str(folder))
            self._add_prompt(folder / ADAPTER[0])
            kind = str(self.adapter.peft_config["default"].peft_type.value).lower()
        else:
            self._write_entries(folder)
            kind = "entries"
        found = "" if self.adapter is None else digest_of_adapter(folder)
        Trained(kind, self.model.origin, self.base, _checkpoint(self.model), found).write(folder)

    def _add_prompt(self, path: Path) -> None:
        """Say in the adapter's configuration what it was trained to answer.

        PEFT hands on what it finds in ``auto_mapping`` and refuses nothing there, but warns of
        fields that it does not know.
        """
        if self.model.prompt is None:
            return
        config = read_plain_json(path)
        mapping = config.get("auto_mapping") or {}
        config["auto_mapping"] = {**mapping, PROMPT: self.model.prompt.to_dict()}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    def _write_entries(self, folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, mask in (self.masks or {}).items():
            whole = bool(mask.all())
            parameter = self.parameters[name].detach()
            tensors[f"{name}:all" if whole else name] = parameter if whole else parameter[mask]
            if not whole:
                tensors[f"{name}:where"] = mask
        write_tensors(folder / ENTRIES, ENTRIES_SCHEMA, tensors, {})

    def adapted(self) -> HookedModel:
        """Return the model that validation saw: plain if that loses no bit.

        An adapter to weights in 16 bits stays separate, where hooks do not reach; and so does
        one that they cannot take, such as vectors where there is no bias.
        """
        if self.adapter is not None and not in_16_bits(self.model.hf) and self._can_merge():
            return self.merged()
        self.model.origin = "adapted"
        return self.model

    def _can_merge(self) -> bool:
        check = getattr(self.adapter.base_model, "_check_layers", None)
        if check is None:
            return True
        try:
            check(None, finite=False)
        except InputError:
            return False
        return True

    def merged(self) -> HookedModel:
        """Return a plain model of the type that the weights have; the adapter is gone then."""
        if self.adapter is None:
            self.model.origin = "adapted"
            return self.model
        from peft.utils import ModulesToSaveWrapper

        dtypes = {
            name.removeprefix("base_model.model."): next(wrapper.original_module.parameters()).dtype
            for name, wrapper in self.adapter.named_modules()
            if isinstance(wrapper, ModulesToSaveWrapper)
        }
        plain = self.adapter.merge_and_unload()
        for name, dtype in dtypes.items():
            plain.get_submodule(name).to(dtype)
        for parameter in plain.parameters():
            parameter.requires_grad_(True)
        model = self.model
        found = HookedModel(
            plain, model._tokenizer, model.name, "adapted", model.labels, model.composite
        )
        found.prompt = model.prompt
        return found


def merged_copy(module: Any) -> Any:
    """Return a module as it acts: itself, or a copy with an adapter merged in, not rounded."""
    if not hasattr(module, "base_layer"):
        return module
    adapted: Any = deepcopy(module)
    stored = adapted.base_layer.weight.dtype
    if hasattr(adapted, "drop_vectors"):
        # They are no change of a weight, where there is no bias to take them.
        adapted.drop_vectors()
    adapted.to(torch.promote_types(stored, torch.float32)).merge()
    return adapted.base_layer


def whole_modules_in_float32(adapter: Any) -> bool:
    """Have what PEFT copies whole (``modules_to_save``) in float32; say if any was in 16 bits.

    PEFT does so with adapter layers only.
    """
    from peft.utils import ModulesToSaveWrapper

    found = False
    for wrapper in adapter.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            if not in_16_bits(module):
                continue
            found = True
            module.float()
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                # Their kernels take one type.
                wrapper.register_forward_pre_hook(_in_float32)
            wrapper.register_forward_hook(_in_the_type_of_the_rest)
    return found


def _in_float32(wrapper: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def _in_the_type_of_the_rest(wrapper: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.to(next(wrapper.original_module.parameters()).dtype)


def _type_of(model: HookedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _checkpoint(model: HookedModel) -> str:
    """The folder that exactly these weights can be loaded from; empty if they came from none."""
    return str(Path(model.name).resolve()) if model.origin == "folder" else ""
