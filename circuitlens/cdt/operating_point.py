"""The operating point: what the clean run leaves for later runs to hold on to.

A frozen attention pattern A makes a head's output a linear map of its values, z = A·v. So the hook
that freezes a pattern sits at z: it takes v of the present run and A of the clean one. (Editing
``hook_pattern`` would do the same in most families, but in some, such as OPT and BERT, that hook
shows the pattern only after it was used, and the edit would be lost.)

If β starts at column c of the batch, a causal model with frozen patterns moves nothing to the left
of c. Later runs then compute the columns from c on only: what these heads read further left is
A[c:, :c]·v[:c], a constant of the clean run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.cdt.rules import RuleSet
from circuitlens.cdt.secant import Secant, activation_sites, capped_labels, secant, site_hooks
from circuitlens.errors import UnsupportedModelError
from circuitlens.models.batch import Batch
from circuitlens.models.families import ActivationSite
from circuitlens.models.hooked import Forward, HookedModel
from circuitlens.models.hooks import (
    Hook,
    layer_of,
    pattern_hook,
    read_values,
    recording,
    value_hook,
)

__all__ = ["OperatingPoint", "apply_pattern", "frozen_routing", "frozen_scales"]


@dataclass(frozen=True)
class OperatingPoint:
    """Clean values of the last columns of one batch.

    Attributes:
        labels: logits of the label tokens.
        residuals: the residual stream entering each layer.
        z: the heads' outputs.
        patterns: attention of the columns among themselves, if the rules freeze patterns.
        earlier: what heads read from the columns before, if there are any.
        held: by hook name, other values that the rules freeze (norm scales, routing).
        secants: by hook name, linear maps in place of activations, if the rules want them.
        cap: the same in place of the cap on logits, for models that have one.
    """

    labels: Float[Tensor, "batch label"]
    residuals: dict[int, Float[Tensor, "row pos d_model"]]
    z: dict[int, Float[Tensor, "row pos head d_head"]]
    patterns: dict[int, Float[Tensor, "row head query key"]]
    earlier: dict[int, Float[Tensor, "row query head d_head"]]
    held: dict[str, Tensor]
    secants: dict[str, tuple[ActivationSite, Secant]]
    cap: Float[Tensor, "batch label"] | None

    @classmethod
    @torch.no_grad()
    def capture(
        cls,
        model: HookedModel,
        batch: Batch,
        rules: RuleSet,
        *,
        first: int = 0,
        forward: Forward | None = None,
    ) -> OperatingPoint:
        """Run ``batch`` and keep the residual stream and what ``rules`` freeze.

        Args:
            model: the model.
            batch: prompts.
            rules: what is frozen.
            first: keep the columns from this one on; more than 0 needs frozen patterns.
            forward: what makes logits; the default is those of label tokens.
        """
        secants: dict[str, tuple[ActivationSite, Secant]] = {}

        def last(value: Tensor) -> Tensor:
            return _last_columns(value, batch, first)

        def keep_secant(site: ActivationSite) -> dict[str, Hook]:
            def at(post: Tensor, up: Tensor, gate: Tensor | None) -> None:
                secants[site.post] = site, secant(model, site, post, up, gate).map(last)

            return site_hooks(site, at)

        layers = range(model.geometry.n_layers)
        constants = [*frozen_scales(model, rules), *frozen_routing(model, rules)]
        wanted = [*constants, *(f"blocks.{layer}.hook_in" for layer in layers)]
        wanted += [model.z_hook(layer) for layer in layers]
        if rules.freeze_patterns:
            wanted += [pattern_hook(layer) for layer in layers]
            wanted += [value_hook(layer) for layer in layers if first]
        hooks, store = recording(wanted)
        if rules.activation == "secant":
            for site in activation_sites(model):
                hooks |= keep_secant(site)
        forward = forward or model.label_logits
        cap: Tensor | None = None
        if rules.activation == "secant":
            labels, cap = capped_labels(model, batch, hooks, forward)
        else:
            labels = forward(batch, hooks)

        patterns: dict[int, Tensor] = {}
        earlier: dict[int, Tensor] = {}
        for layer in layers if rules.freeze_patterns else ():
            pattern = store.pop(pattern_hook(layer))[:, :, first:]
            patterns[layer] = pattern[..., first:]
            if first:
                v = store.pop(value_hook(layer))[:, :first]
                earlier[layer] = read_values(pattern[..., :first], v, model.geometry.d_head)
        return cls(
            labels=labels,
            residuals={layer: last(store[f"blocks.{layer}.hook_in"]) for layer in layers},
            z={layer: last(store[model.z_hook(layer)]) for layer in layers},
            patterns=patterns,
            earlier=earlier,
            held={name: last(store[name]) for name in constants},
            secants=secants,
            cap=cap,
        )

    @property
    def holds(self) -> bool:
        """Whether anything is frozen; if not, a later run is the clean one."""
        return bool(self.patterns or self.held or self.secants)

    def hooks(
        self, *, from_layer: int = 0, times: int = 1, given_z: bool = False
    ) -> dict[str, Hook]:
        """Hooks that hold the frozen values in a later run.

        Args:
            from_layer: leave out what lies in layers below, which such a run does not compute.
            times: the run has the batch's rows this many times over.
            given_z: leave out what lies inside the attention of that layer too.
        """
        inside = f"blocks.{from_layer}.attn."

        def wide(value: Tensor) -> Tensor:
            return value if times == 1 else value.expand(times, *value.shape).flatten(0, 1)

        def constant(value: Tensor) -> Hook:
            return lambda _: wide(value)

        def linear(site: ActivationSite, secant: Secant) -> dict[str, Hook]:
            return site_hooks(site, lambda _, up, gate: secant.map(wide)(up, gate))

        hooks = {
            name: constant(value)
            for name, value in self.held.items()
            if layer_of(name) >= from_layer and not (given_z and name.startswith(inside))
        }
        for name, (site, map_) in self.secants.items():
            if layer_of(name) >= from_layer:
                hooks |= linear(site, map_)
        for layer, pattern in self.patterns.items():
            if layer > from_layer or (layer == from_layer and not given_z):
                hooks |= apply_pattern(layer, pattern, self.earlier.get(layer))
        return hooks


def _last_columns(value: Tensor, batch: Batch, first: int) -> Tensor:
    if not first:
        return value
    if value.shape[:2] == batch.input_ids.shape:
        return value[:, first:]
    # Experts see the tokens of the whole batch in one row.
    columns: Tensor = value.unflatten(0, tuple(batch.input_ids.shape))[:, first:]
    return columns.flatten(0, 1)


def apply_pattern(
    layer: int,
    pattern: Float[Tensor, "row head query key"],
    earlier: Float[Tensor, "row query head d_head"] | None = None,
) -> dict[str, Hook]:
    """Hooks that make z of a layer the given pattern times the values of the present run.

    Args:
        layer: the layer.
        pattern: attention weights; a run may have their rows several times over.
        earlier: what the heads read further left.
    """
    values: list[Tensor] = []

    def see(v: Tensor) -> None:
        values[:] = [v]

    def mix(z: Tensor) -> Tensor:
        read = read_values(pattern, values.pop(), z.shape[-1])
        if earlier is None:
            return read
        both: Tensor = read.unflatten(0, (-1, len(earlier))) + earlier
        return both.flatten(0, 1)

    return {value_hook(layer): see, HookedModel.z_hook(layer): mix}


def frozen_scales(model: HookedModel, rules: RuleSet) -> list[str]:
    """Names of the hooks of all norm denominators that the rules hold.

    Raises:
        UnsupportedModelError: if a layer has none.
    """
    if not rules.freeze_scales:
        return []
    found = [name for name in model.bridge.hook_dict if name.endswith(".hook_scale")]
    layers = {int(name.split(".")[1]) for name in found if name.startswith("blocks.")}
    if missing := set(range(model.geometry.n_layers)) - layers:
        raise UnsupportedModelError(
            f"Layer {min(missing)} of {model.name} has no norm scale to freeze: use a rule set "
            "that leaves scales live."
        )
    # A norm of queries or keys acts on nothing but patterns, one of embeddings on no source.
    within = (".q_norm.", ".k_norm.") if rules.freeze_patterns else ()
    return [
        name
        for name in found
        if not name.startswith("embed") and not any(part in name for part in within)
    ]


def frozen_routing(model: HookedModel, rules: RuleSet) -> list[str]:
    """Names of the hooks at which tokens are sent to experts, if the rules hold patterns."""
    if not rules.freeze_patterns:
        return []
    hooks, layers = model.bridge.hook_dict, range(model.geometry.n_layers)
    return [name for layer in layers for name in model.family.routing(layer, hooks)]
