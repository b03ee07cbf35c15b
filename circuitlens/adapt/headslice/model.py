"""The tuner: puts leaves around the modules of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from circuitlens.adapt.headslice.config import HeadSliceConfig
from circuitlens.adapt.headslice.layer import HeadSliceLayer, layer_for, layer_type
from circuitlens.adapt.headslice.registration import PREFIX
from circuitlens.adapt.headslice.selection import Target, targets_of
from circuitlens.errors import InputError, UnsupportedModelError

__all__ = ["HeadSliceModel"]


class HeadSliceModel(BaseTuner):  # type: ignore[misc]
    """A Hugging Face model with head-slice adapters; made by :func:`peft.get_peft_model`."""

    prefix = PREFIX
    tuner_layer_cls = HeadSliceLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    _targets: dict[str, Target]

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: HeadSliceConfig, model: nn.Module) -> None:
        # Before any module is replaced, so that a rejected adapter leaves the model as it was.
        self._targets = targets_of(model, peft_config)
        for path, target in self._targets.items():
            module = model.get_submodule(path)
            if isinstance(module, BaseTunerLayer) and type(module) is not layer_type(target):
                other = (
                    "other parts of these heads"
                    if isinstance(module, HeadSliceLayer)
                    else "another method"
                )
                raise UnsupportedModelError(
                    f"{path} already has an adapter of {other}: merge or unload that one first."
                )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Put an adapter in.

        Raises:
            InputError: for a name that no module can have.
        """
        if "." in adapter_name or not adapter_name:
            raise InputError(
                f"An adapter cannot be named {adapter_name!r}: modules are named with dots between "
                "them, so use a name without, such as "
                f"{adapter_name.replace('.', '-') or 'default'!r}."
            )
        return super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        what = self._targets[current_key]
        if isinstance(target, HeadSliceLayer):
            target.add_adapter(adapter_name, what)
            return
        layer = layer_for(target, what)
        layer.add_adapter(adapter_name, what)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for path, module in self.model.named_modules():
            if isinstance(module, HeadSliceLayer) and _is_quantised(module.base_layer):
                raise InputError(
                    f"{path} has quantised weights ({type(module.base_layer).__name__}), to which "
                    "nothing can be added: load the model unquantised, load the adapter into it, "
                    "and merge there."
                )

    def _check_layers(self, adapter_names: list[str] | None, *, finite: bool) -> None:
        """Reject a merge before the first layer is written, so that the base stays as it is."""
        for module in self.model.modules():
            if isinstance(module, HeadSliceLayer):
                module.check_merge(adapter_names, finite=finite)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge in all layers, or in none.

        Raises:
            InputError: if a layer cannot be merged.
        """
        self._check_layers(adapter_names, finite=safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_layers(adapter_names, finite=safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the first that is left becomes active.

        Raises:
            ValueError: if there is no such adapter.
        """
        others = [name for name in self.peft_config if name != adapter_name]
        active = [name for name in self.active_adapters if name in others] or others[:1]
        if active and adapter_name in self.active_adapters:
            # Else each layer would choose by itself, and not all layers have the same adapters.
            self.set_adapter(active)
        super().delete_adapter(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop the argument without a word.
        if kwargs.get("adapter_names") is not None:
            raise InputError(
                "The head-slice adapter cannot use several adapters in one batch (adapter_names=…):"
                " use set_adapter and one batch for each."
            )
        yield


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module's weights are not numbers of their own (told without the libraries)."""
    weight = getattr(module, "weight", None)
    return (
        weight is None
        or not weight.dtype.is_floating_point
        or weight.dtype.itemsize < 2
        or hasattr(weight, "quant_state")
        or type(module).__module__.startswith(("bitsandbytes.", "hqq.", "gptqmodel."))
    )
