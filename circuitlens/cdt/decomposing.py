"""The public call to decompose logits and activations, by frozen rules or the published ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.decomposition import (
    Decomposition,
    check_heads,
    check_means,
    check_nodes,
    check_tokens,
)
from circuitlens.cdt.difference import FrozenNetwork, Source
from circuitlens.cdt.hsu2024 import decompose_published
from circuitlens.cdt.rules import RULES, RuleSet
from circuitlens.errors import CircuitLensError, InputError, check_choice
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import recording
from circuitlens.node_means import NodeMeans
from circuitlens.nodes import MLP, Head
from circuitlens.utils.row_budget import RowBudget

__all__ = ["decompose"]

# What makes attention patterns, from queries and keys on.
_MAKES_PATTERNS = re.compile(
    r"\.attn\.([qk](_norm)?\.hook_\w+|qkv\.hook_out|hook_(rot_)?[qk]|hook_attn_scores|hook_pattern)$"
)


@torch.no_grad()
def decompose(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    sources: Sequence[Sequence[tuple[Head | MLP, int | None]]],
    means: Float[Tensor, "layer pos head d_head"] | MeanBaseline,
    rules: str | RuleSet = "cdt",
    targets: Sequence[tuple[Head, int]] | None = None,
    *,
    mlp_means: Float[Tensor, "layer pos d_model"] | None = None,
    hooks: Sequence[str] | Literal["all"] = (),
    batch_size: int = 64,
    quiet: bool = False,
) -> Decomposition:
    """Decompose logits and activations into what stems from sources (β) and what does not (γ).

    At a source γ is the mean and β the deviation from it. A rule set carries β by difference or
    secant through the network with some parts frozen (:data:`circuitlens.RULES`); ``"hsu2024"``
    carries both through the network by the published rules (Hsu et al. 2024, arXiv 2407.00886). The
    result has the model's type; by the published rules at least float32, because in 16 bits TOL is
    lost and the norms' E[x²] − E[x]² cancels.

    Args:
        model: for the published rules, a GPT-2; else any.
        tokens: prompts of one length; padding would be read as text.
        sources: source sets; each is decomposed by itself. A set lists (node, position) pairs;
            position ``None`` stands for all, and negative ones count from the end. Under an
            empty set nothing is relevant. MLPs need a rule set and their means.
        means: mean output z of every head at every position, or a baseline, which has means of
            MLPs too.
        rules: the name of a rule set, your own rule set, or ``"hsu2024"``.
        targets: (head, position) pairs; their z is recorded after sources were set there.
        mlp_means: mean output of every MLP at every position, in place of a baseline's.
        hooks: names of hooks whose activations are decomposed too (rule sets only); ``"all"`` is
            the residual stream entering each layer, z, what attention and MLPs write, activations,
            and the input of the head. Queries, keys, scores and patterns have no β if patterns are
            frozen.
        batch_size: rows (one prompt under one source set) that are computed at once; sets memory,
            not the result. With a rule set it halves, with a line in the log, when memory runs
            out.
        quiet: no progress bar.

    Raises:
        InputError: if the rules are unknown, the model lacks a head, position, token or hook, a
            hook lies on the way to frozen patterns, the means have another shape than the nodes'
            outputs or are of another model, or an MLP is a source without means of MLPs.
        UnsupportedModelError: if the published rules do not know the model's maps.
    """
    if not isinstance(rules, RuleSet):
        check_choice("rules", rules, (*RULES, "hsu2024"))
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, but is {batch_size}.")
    if rules == "hsu2024":
        if hooks or mlp_means is not None:
            raise InputError(
                "rules='hsu2024' decompose logits and heads only: leave hooks and mlp_means out, "
                "or choose a rule set such as 'cdt'."
            )
        heads, _ = _node_means(model, tokens, means)
        return decompose_published(model, tokens, sources, heads, targets, batch_size, quiet)
    chosen = RULES[rules] if isinstance(rules, str) else rules
    if chosen.activation == "gradient":
        raise InputError(
            f"The rule set {chosen.name!r} uses gradients, which give relevances but no "
            "decomposition of activations: use one by difference or secant."
        )
    heads, mlps = _node_means(model, tokens, means)
    if mlp_means is not None:
        mlps = mlp_means
    return _frozen(
        model, tokens, sources, heads, chosen, targets, mlps, hooks, RowBudget(batch_size)
    )


def _node_means(
    model: HookedModel, tokens: Tensor, means: Tensor | MeanBaseline
) -> tuple[Tensor, Tensor | None]:
    """Means of heads and, if known, of MLPs at every position of the prompts."""
    if not isinstance(means, MeanBaseline):
        return means, None
    means.check_model(model)
    means.check_constant("decompose")
    check_tokens(model, tokens)
    nodes, layers = means.means(), range(model.geometry.n_layers)
    like = nodes.heads.new_zeros(1, tokens.shape[1])
    return (
        torch.stack([nodes.of_heads(layer, like) for layer in layers]),
        torch.stack([nodes.of_mlp(layer, like) for layer in layers]),
    )


def _frozen(
    model: HookedModel,
    tokens: Tensor,
    sources: Iterable[object],
    means: Tensor,
    rules: RuleSet,
    targets: object,
    mlp_means: Tensor | None,
    hooks: Sequence[str] | Literal["all"],
    budget: RowBudget,
) -> Decomposition:
    check_tokens(model, tokens)
    batch = model.unlabelled(tokens)
    n_rows, n_pos = batch.input_ids.shape
    check_means(model, means, n_pos)
    g = model.geometry
    if mlp_means is not None and tuple(mlp_means.shape) != (g.n_layers, n_pos, g.d_model):
        raise InputError(
            f"mlp_means must have the shape (layer, pos, d_model), {(g.n_layers, n_pos, g.d_model)}"
            f" for this model and these prompts, but it is {tuple(mlp_means.shape)}."
        )
    node_means = NodeMeans(
        means.to(model.device), None if mlp_means is None else mlp_means.to(model.device)
    )
    sets = [check_nodes(model, s, n_pos, "source") for s in sources]
    mlps = [node for s in sets for node, _ in s if isinstance(node, MLP)]
    if mlps and mlp_means is None:
        raise InputError(
            f"The source {mlps[0]} is an MLP, but the means are those of heads only: give "
            "mlp_means= too, or a baseline as means (cl.label_balanced_mean)."
        )
    sites = check_heads(model, targets or (), n_pos, "target")
    names = _default_hooks(model) if hooks == "all" else tuple(hooks)
    if unknown := [name for name in names if name not in model.bridge.hook_dict]:
        raise InputError(f"{type(model.hf).__name__} has no hook {unknown[0]!r} to decompose.")
    if rules.freeze_patterns and (held := [n for n in names if _MAKES_PATTERNS.search(n)]):
        raise InputError(
            f"The rule set {rules.name!r} freezes attention patterns, so nothing is relevant at "
            f"the hook {held[0]!r}, which only makes them: leave it out, or choose rules that "
            "freeze no patterns, such as 'ablation'."
        )

    reach = torch.zeros(n_rows, n_pos, dtype=torch.bool, device=model.device)
    for _, position in (site for s in sets for site in s):
        reach[:, slice(None) if position is None else position] = True
    for _, position in sites:
        reach[:, position] = True
    record = dict.fromkeys(names, _whole)
    for head, _ in sites:
        record.setdefault(model.z_hook(head.layer), _whole)
    try:
        network = FrozenNetwork(
            model,
            batch,
            rules,
            # A column that is not computed has no activations to show.
            reach=None if names else reach,
            record=record,
            whole_vocabulary=True,
        )
    except ValueError as error:
        # TransformerLens has some hooks only after a setting that changes how it computes.
        if isinstance(error, CircuitLensError) or "Cannot add hook" not in str(error):
            raise
        name = next((n for n in names if n in str(error)), names[0])
        raise InputError(
            f"{type(model.hf).__name__} does not compute what the hook {name!r} shows: leave it "
            "out."
        ) from error
    masks = [[_source(node, position, reach) for node, position in s] for s in sets]
    logits, recorded = network.patched(masks, node_means, budget)
    total = network.labels.expand(len(sets), -1, -1)
    shape = (len(sets), n_rows, len(sites), g.d_head)
    z_total = network.labels.new_zeros(shape, dtype=model.dtype)
    z_relevant = z_total.clone()
    for k, (head, position) in enumerate(sites):
        assert position is not None
        name = model.z_hook(head.layer)
        column = position - network.first
        z_total[:, :, k] = network.recorded[name][:, column, head.index]
        z_relevant[:, :, k] = z_total[:, :, k] - recorded[name][:, :, column, head.index]
    return Decomposition(
        relevant=total - logits,
        total=total,
        target_relevant=z_relevant,
        target_total=z_total,
        activations_relevant={n: network.recorded[n] - recorded[n] for n in names},
        activations={n: network.recorded[n] for n in names},
        _real=partial(_native, model, tokens, names),
    )


def _whole(activation: Tensor) -> Tensor:
    return activation


def _source(node: Head | MLP, position: int | None, like: Tensor) -> Source:
    where = torch.zeros_like(like)
    where[:, slice(None) if position is None else position] = True
    return Source(node, where)


def _default_hooks(model: HookedModel) -> tuple[str, ...]:
    layers = range(model.geometry.n_layers)
    names: list[str] = []
    for layer in layers:
        names += [
            f"blocks.{layer}.hook_in",
            model.z_hook(layer),
            f"blocks.{layer}.attn.o.hook_out",
            model.mlp_hook(layer),
        ]
    names += [site.post for site in model.activations()]
    return (*(n for n in names if ".experts." not in n), model.readout.input_hook())


@torch.no_grad()
def _native(model: HookedModel, tokens: Tensor, names: Sequence[str]) -> Mapping[str, Tensor]:
    """What the model computes when no hook changes anything."""
    batch = model.unlabelled(tokens)
    hooks, found = recording(names)
    model.logits(batch, hooks)
    return {**found, "logits": model.hf_logits(batch)}
