"""The operating point: what the clean run leaves for later runs to hold on to.

A frozen attention pattern A makes a head's output a linear map of its values, z = A·v. So the hook
that freezes a pattern sits at z: it takes v of the present run and A of the clean one. (Editing
``hook_pattern`` would do the same in most families, but in some, such as OPT and BERT, that hook
shows the pattern only after it was used, and the edit would be lost.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.batch import Batch
from circuitlens.cdt.rules import RuleSet
from circuitlens.errors import UnsupportedModelError
from circuitlens.model import Hook, HookedModel

__all__ = ["OperatingPoint", "apply_pattern", "frozen_scales", "pattern_hook", "then"]


@dataclass(frozen=True)
class OperatingPoint:
    """Clean values of one batch.

    Attributes:
        logits: at the decision position.
        patterns: of every layer, if the rules freeze them.
        scales: norm denominators by hook name, if the rules freeze them.
        residuals: the residual stream entering each layer.
        z: head outputs of each layer.
    """

    logits: Float[Tensor, "batch d_vocab"]
    patterns: dict[int, Float[Tensor, "batch head query key"]]
    scales: dict[str, Tensor]
    residuals: dict[int, Float[Tensor, "batch pos d_model"]]
    z: dict[int, Float[Tensor, "batch pos head d_head"]]

    @classmethod
    @torch.no_grad()
    def capture(cls, model: HookedModel, batch: Batch, rules: RuleSet) -> OperatingPoint:
        """Run ``batch`` and keep what ``rules`` freeze, the residual stream and z."""
        patterns: dict[int, Tensor] = {}
        scales: dict[str, Tensor] = {}
        residuals: dict[int, Tensor] = {}
        z: dict[int, Tensor] = {}

        def into(store: dict[int, Tensor] | dict[str, Tensor], key: int | str) -> Hook:
            def hook(activation: Tensor) -> None:
                store[key] = activation.detach()  # type: ignore[index]

            return hook

        hooks: dict[str, Hook] = {}
        if rules.freeze_scales:
            hooks |= {name: into(scales, name) for name in frozen_scales(model)}
        for layer in range(model.geometry.n_layers):
            if rules.freeze_patterns:
                hooks[pattern_hook(layer)] = into(patterns, layer)
            hooks[f"blocks.{layer}.hook_in"] = into(residuals, layer)
            hooks[model.z_hook(layer)] = into(z, layer)
        return cls(model.logits(batch, hooks), patterns, scales, residuals, z)

    def hooks(self, *, from_layer: int = 0, times: int = 1) -> dict[str, Hook]:
        """Hooks that hold the frozen values in a later run.

        Args:
            from_layer: leave out what lies in layers below, which such a run does not compute.
            times: the run has the batch's rows this many times over.
        """

        def hold(value: Tensor) -> Hook:
            return lambda _: _wide(value, times)

        held = {
            name: hold(value)
            for name, value in self.scales.items()
            if not name.startswith("blocks.") or int(name.split(".")[1]) >= from_layer
        }
        return held | self.pattern_hooks(from_layer=from_layer, times=times)

    def pattern_hooks(self, *, from_layer: int = 0, times: int = 1) -> dict[str, Hook]:
        """The part of :meth:`hooks` that holds attention patterns."""
        held: dict[str, Hook] = {}
        for layer, pattern in self.patterns.items():
            if layer >= from_layer:
                held |= apply_pattern(layer, partial(_wide, pattern, times))
        return held


def _wide(value: Tensor, times: int) -> Tensor:
    return value if times == 1 else value.expand(times, *value.shape).flatten(0, 1)


def pattern_hook(layer: int) -> str:
    """Canonical name of the attention pattern's hook."""
    return f"blocks.{layer}.attn.hook_pattern"


def apply_pattern(layer: int, pattern: Callable[[], Tensor]) -> dict[str, Hook]:
    """Hooks that make z of a layer the given pattern times the values of the present run.

    Args:
        layer: the layer.
        pattern: is called when z is due, after the pattern's own hook fired.
    """
    values: list[Tensor] = []

    def see(v: Tensor) -> None:
        values[:] = [v]

    def mix(z: Tensor) -> Tensor:
        a = pattern()
        batch, positions, heads, size = z.shape
        v = values.pop().reshape(batch, positions, -1, size)
        # Grouped-query attention: each value head serves a run of query heads.
        v = v.repeat_interleave(heads // v.shape[2], dim=2)
        return torch.einsum("bhqk,bkhd->bqhd", a.to(v), v)

    return {f"blocks.{layer}.attn.v.hook_out": see, HookedModel.z_hook(layer): mix}


def then(hooks: dict[str, Hook], name: str, second: Hook) -> None:
    """Add ``second`` to ``hooks`` under ``name``, to run on what is there already returns."""
    first = hooks.get(name)
    if first is None:
        hooks[name] = second
        return
    before = first

    def both(activation: Tensor) -> Tensor | None:
        changed = before(activation)
        return second(activation if changed is None else changed)

    hooks[name] = both


def frozen_scales(model: HookedModel) -> Iterable[str]:
    """Names of the hooks of all norm denominators.

    Raises:
        UnsupportedModelError: if a layer has none.
    """
    found = [name for name in model.bridge.hook_dict if name.endswith(".hook_scale")]
    layers = {int(name.split(".")[1]) for name in found if name.startswith("blocks.")}
    if missing := set(range(model.geometry.n_layers)) - layers:
        raise UnsupportedModelError(
            f"Layer {min(missing)} of {model.name} has no norm scale to freeze: use a rule set "
            "that leaves scales live."
        )
    return found
