"""β by difference: patch sources, hold what is frozen, run the layers above them.

1. The clean run leaves the residual stream and the frozen parts (the operating point).
2. Each source set is a copy of the batch in which the sources' outputs are replaced by their
   means. Copies whose lowest source is in the same layer run together, from the cached residual
   stream of that layer.
3. β anywhere is the activation of the frozen network without a patch minus that of the copy.
   (Not the clean activation: the same values computed through held scales round differently, which
   in bfloat16 would drown the small heads.)

With patterns and norm scales frozen this is CD-T's propagation with β' = f(t) − f(t − β) at
activations and biases left with γ; with nothing frozen it is exact mean ablation; with secants for
activations, β is linear in the source.

With frozen patterns in a causal model, only the columns that β can reach are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitlens.cdt.operating_point import OperatingPoint
from circuitlens.cdt.relevances import Relevances
from circuitlens.cdt.rules import RuleSet
from circuitlens.cdt.secant import capped_labels
from circuitlens.models.batch import Batch, Positions, margin
from circuitlens.models.hooked import Forward, HookedModel
from circuitlens.models.hooks import Hook, layer_of, then
from circuitlens.node_means import NodeMeans
from circuitlens.nodes import MLP, Head, Node
from circuitlens.utils.row_budget import RowBudget

__all__ = ["FrozenNetwork", "Source", "SourceSet", "relevance_by_difference"]

# What a processor's caches take.
DEFAULT_ROWS = 32


@dataclass(frozen=True)
class Source:
    """A node that deviates from its mean at some positions.

    Attributes:
        node: a head or an MLP.
        where: the positions.
    """

    node: Node
    where: Bool[Tensor, "batch pos"]


SourceSet = Sequence[Source]


class FrozenNetwork:
    """The network of one batch with the frozen parts held, for any number of patched copies.

    Attributes:
        labels: label logits of the frozen network without a patch.
        first: column from which on it computes.
    """

    def __init__(
        self,
        model: HookedModel,
        batch: Batch,
        rules: RuleSet,
        *,
        reach: Bool[Tensor, "batch pos"] | None = None,
        record: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        whole_vocabulary: bool = False,
    ) -> None:
        """Run ``batch`` and hold what ``rules`` freeze.

        Args:
            model: the model.
            batch: prompts.
            rules: what is frozen.
            reach: all positions at which there will be sources; lets columns to their left go.
            record: by hook name, what to keep of the activations there.
            whole_vocabulary: ``labels`` are the logits of all tokens.
        """
        self.model = model
        self._logits: Forward = model.logits if whole_vocabulary else model.label_logits
        self.first = 0
        if reach is not None and rules.freeze_patterns and model.family.causal:
            columns = reach.any(0).nonzero()[:, 0]
            self.first = int(columns[0]) if len(columns) else batch.input_ids.shape[1] - 1
        self._record = dict(record or {})
        self.batch = batch.last(batch.input_ids.shape[1] - self.first)
        self._point = OperatingPoint.capture(
            model, batch, rules, first=self.first, forward=self._logits
        )
        self.recorded: dict[str, Tensor] = {}
        if self._point.holds or self._record:
            self.labels = self._forward(1, 0, {}, self.recorded)
        else:
            self.labels = self._point.labels

    @torch.no_grad()
    def patched(
        self, sets: Sequence[SourceSet], means: NodeMeans, budget: RowBudget | None = None
    ) -> tuple[Float[Tensor, "source batch label"], dict[str, Float[Tensor, "source ..."]]]:
        """Label logits, and what is recorded, with the sources of each set at their means.

        Args:
            sets: source sets; each is a copy of the batch.
            means: what sources are set to.
            budget: prompts that go through the model at once; sets memory, not the result.
        """
        budget = budget or RowBudget(DEFAULT_ROWS)
        labels = self.labels.expand(len(sets), -1, -1).clone()
        recorded = {
            name: value.expand(len(sets), *value.shape).clone()
            for name, value in self.recorded.items()
        }
        for layer in range(self.model.geometry.n_layers):
            group = [k for k, s in enumerate(sets) if s and min(x.node.layer for x in s) == layer]
            if not group:
                continue

            def run(chunk: range, layer: int = layer, group: Sequence[int] = group) -> Tensor:
                indices = [group[k] for k in chunk]
                hooks = self._patches([sets[k] for k in indices], means)
                seen: dict[str, Tensor] = {}
                found = self._forward(len(indices), layer, hooks, seen)
                for name, value in seen.items():
                    recorded[name][indices] = value.unflatten(0, (len(indices), -1))
                each: Tensor = found.unflatten(0, (len(indices), len(self.batch)))
                return each

            found = budget.chunked(len(group), run, rows_per_item=len(self.batch.input_ids))
            labels[group] = torch.cat(found)
        return labels, recorded

    @torch.no_grad()
    def _forward(
        self, times: int, layer: int, patches: Mapping[str, Hook], seen: dict[str, Tensor]
    ) -> Float[Tensor, "row label"]:
        copies = self.batch.repeat(times)
        residual = self._point.residuals[layer].repeat(times, 1, 1)
        # What enters the lowest layer is clean, so its heads' outputs are known; but the attention
        # has to run for what is recorded inside it.
        known = self.model.takes_z and not any(_inside_attention(n, layer) for n in self._record)
        z = self._point.z[layer].repeat(times, 1, 1, 1) if known else None
        hooks = self._point.hooks(from_layer=layer, times=times, given_z=z is not None)
        if layer == 0:
            # No block lies below that could hand the residual stream on.
            hooks["blocks.0.hook_in"] = lambda _: residual
        for name, patch in patches.items():
            then(hooks, name, patch)
        for name, select in self._record.items():
            if layer_of(name) >= layer:
                then(hooks, name, _recorder(seen, name, select))
        with self.model.starting_at(layer, residual, z):
            if self._point.cap is None:
                return self._logits(copies, hooks)
            cap = self._point.cap.repeat(times, 1)
            return capped_labels(self.model, copies, hooks, self._logits, cap)[0]

    def _patches(self, sets: Sequence[SourceSet], means: NodeMeans) -> dict[str, Hook]:
        """Hooks that replace sources by means, copy by copy."""
        g, (rows, width) = self.model.geometry, self.batch.input_ids.shape
        heads: dict[int, Tensor] = {}
        mlps: dict[int, Tensor] = {}
        for copy, sources in enumerate(sets):
            for source in sources:
                where, node = source.where[:, self.first :], source.node
                if isinstance(node, Head):
                    shape = (len(sets), rows, width, g.n_heads)
                    store = heads.setdefault(node.layer, where.new_zeros(shape))
                    store[copy, :, :, node.index] |= where
                else:
                    store = mlps.setdefault(node.layer, where.new_zeros(len(sets), rows, width))
                    store[copy] |= where
        hooks: dict[str, Hook] = {}
        for layer, chosen in heads.items():
            mean = partial(means.of_heads, layer)
            hooks[self.model.z_hook(layer)] = _put(chosen.flatten(0, 1), mean)
        for layer, chosen in mlps.items():
            mean = partial(means.of_mlp, layer)
            hooks[self.model.mlp_hook(layer)] = _put(chosen.flatten(0, 1), mean)
        return hooks


def _inside_attention(name: str, layer: int) -> bool:
    """Whether a hook does not fire if the layer's attention is given z."""
    inside = f"blocks.{layer}.attn."
    if name == f"blocks.{layer}.hook_attn_out":
        return True
    return name.startswith(inside) and not name.startswith((f"{inside}o.", f"{inside}hook_z"))


def _put(where: Tensor, mean: Callable[[Tensor], Tensor]) -> Hook:
    return lambda output: torch.where(where[..., None], mean(output), output)


def _recorder(seen: dict[str, Tensor], name: str, select: Callable[[Tensor], Tensor]) -> Hook:
    def hook(activation: Tensor) -> None:
        seen[name] = select(activation).clone()

    return hook


def relevance_by_difference(
    model: HookedModel,
    batch: Batch,
    means: NodeMeans,
    rules: RuleSet,
    *,
    positions: Positions = "all",
    mlps: bool = False,
    by_position: bool = False,
    budget: RowBudget | None = None,
) -> Relevances:
    """How far β of each node moves the task margin, in logits.

    Args:
        model: the model.
        batch: prompts.
        means: the baseline μ.
        rules: what is frozen; the activation must go by ``difference`` or ``secant``.
        positions: where the node deviates from its mean.
        mlps: score MLPs too.
        by_position: score every head at every single position too (a pass for each).
        budget: prompts that go through the model at once; sets memory, not the result.
    """
    g = model.geometry
    where, means = batch.mask(positions), means.on(model, batch)
    network = FrozenNetwork(model, batch, rules, reach=where)
    clean = margin(network.labels, batch.gold)
    sets: list[list[Source]] = [[Source(head, where)] for head in g]
    if mlps:
        sets += [[Source(MLP(layer), where)] for layer in range(g.n_layers)]
    if by_position:
        for column in range(where.shape[1]):
            only = torch.zeros_like(where)
            only[:, column] = where[:, column]
            sets += [[Source(head, only)] for head in g if only.any()]
    labels, _ = network.patched(sets, means, budget)
    found = (clean - margin(labels, batch.gold)).T
    heads, found = found[:, : len(g)], found[:, len(g) :]
    of_mlps, found = (found[:, : g.n_layers], found[:, g.n_layers :]) if mlps else (None, found)
    at: Tensor | None = None
    if by_position:
        at = found.new_zeros(len(batch), where.shape[1], g.n_layers, g.n_heads)
        columns = where.any(0).nonzero()[:, 0]
        at[:, columns] = found.unflatten(1, (len(columns), g.n_layers, g.n_heads))
        # Where a prompt has padding, nothing was patched and what is left is rounding.
        at = torch.where(where[:, :, None, None], at, 0.0)
    return Relevances(heads.unflatten(1, (g.n_layers, g.n_heads)), of_mlps, at)
