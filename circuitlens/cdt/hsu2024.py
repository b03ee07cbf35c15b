"""The published CD-T, to the letter: Hsu et al. 2024, arXiv 2407.00886.

Every activation is a pair (r, i), relevant and irrelevant, that adds up to the clean activation.

1. Start: i is the embedding, r is 0.
2. Every map of the network has a rule that makes the pair of its output from that of its input
   (:mod:`circuitlens.cdt.pairs`). Attention has a pattern of the total and one of r alone.
3. At a source (a head's output z at a position) the deviation from the mean becomes relevant and
   the mean irrelevant. Whatever is relevant further up stems from sources.
4. End: the pair of the logits at the last position.

Unlike the engines beside it this one freezes nothing, and it needs to know every map of the
network, so it reads the weights of a GPT-2 instead of speaking hooks.

Below the lowest source r stays 0, so those layers are computed once for all source sets. They are
computed by the rules all the same: TOL takes a little from biases, so i is not quite the clean
activation there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitlens.cdt.gpt2 import PairedGPT2, Site
from circuitlens.errors import InputError
from circuitlens.geometry import Head
from circuitlens.model import HookedModel
from circuitlens.progress import progress

__all__ = ["Decomposition", "decompose"]


@dataclass(frozen=True)
class Decomposition:
    """Relevant and irrelevant parts of logits and head outputs, for every source set.

    The parts of the logits add up to the model's own but for what TOL takes from biases; on random
    weights that was 3e-6 logits with 3 layers of width 32, and 2e-4 with 12 layers of width 768.

    Attributes:
        relevant, irrelevant: logits at the last position.
        target_relevant, target_irrelevant: outputs z of the target heads at their positions;
            without targets that axis has length 0.
    """

    relevant: Float[Tensor, "source batch d_vocab"]
    irrelevant: Float[Tensor, "source batch d_vocab"]
    target_relevant: Float[Tensor, "source batch target d_head"]
    target_irrelevant: Float[Tensor, "source batch target d_head"]


@torch.no_grad()
def decompose(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    sources: Sequence[Sequence[tuple[Head, int | None]]],
    means: Float[Tensor, "layer pos head d_head"],
    rules: str = "hsu2024",
    targets: Sequence[tuple[Head, int]] | None = None,
    *,
    batch_size: int = 64,
    quiet: bool = False,
) -> Decomposition:
    """Decompose logits and head outputs into what stems from sources and what does not.

    The rules are those of Hsu et al. 2024, arXiv 2407.00886. The result has the model's type, but
    float32 at least: in 16 bits TOL is lost and the norms' E[x²] − E[x]² cancels.

    Args:
        model: a GPT-2.
        tokens: prompts of one length; padding would be read as text.
        sources: source sets; each is decomposed by itself. A set lists (head, position) pairs;
            position ``None`` stands for all, and negative ones count from the end. Under an
            empty set nothing is relevant.
        means: mean output z of every head at every position.
        rules: ``"hsu2024"``.
        targets: (head, position) pairs; their z is recorded after sources were set there.
        batch_size: rows (one prompt under one source set) that are computed at once; sets memory,
            not the result.
        quiet: no progress bar.

    Raises:
        InputError: if the rules are unknown, the model lacks a head, position or token, or the
            means have another shape than the heads' outputs.
        UnsupportedModelError: if the model is no GPT-2, or adapters changed its layers.
    """
    if rules != "hsu2024":
        raise InputError(
            f"Rules {rules!r} are unknown to decompose, which knows 'hsu2024'; the rule sets in "
            "cl.RULES are for cl.relevance."
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, but is {batch_size}.")
    network = PairedGPT2(model)
    tokens = _check_tokens(model, tokens)
    means = _check_means(model, means, tokens.shape[1]).to(network.device, network.dtype)
    sets = [_check_sites(model, s, tokens.shape[1], "source") for s in sources]
    sites = _check_sites(model, targets or (), tokens.shape[1], "target")

    # Sets that begin at the same layer go together, so that a chunk skips what it can, and in
    # rising order, so that the layers below are walked once.
    lowest = [min((head.layer for head, _ in s), default=network.n_layers) for s in sets]
    order = sorted(range(len(sets)), key=lowest.__getitem__)
    together = max(1, batch_size // len(tokens))
    chunks = [order[k : k + together] for k in range(0, len(order), together)]

    logits = network.zeros(len(sets), len(tokens), network.d_vocab)
    z_targets = network.zeros(len(sets), len(tokens), len(sites), network.d_head)
    for first in range(0, len(tokens), batch_size):
        rows = slice(first, first + batch_size)
        below = network.start(tokens[rows], len(sites))
        for chunk in progress(chunks, "Decomposing", quiet=quiet):
            below = network.advance(below, lowest[chunk[0]], sites)
            end = network.advance(
                below.repeat(len(chunk)), network.n_layers, sites, [sets[k] for k in chunk], means
            )
            for store, found in ((logits, network.logits(end.x)), (z_targets, end.z_targets)):
                store.relevant[chunk, rows] = found.relevant.unflatten(0, (len(chunk), -1))
                store.irrelevant[chunk, rows] = found.irrelevant.unflatten(0, (len(chunk), -1))
    return Decomposition(
        logits.relevant, logits.irrelevant, z_targets.relevant, z_targets.irrelevant
    )


def _check_tokens(model: HookedModel, tokens: Tensor) -> Int[Tensor, "batch pos"]:
    """Return the prompts on the model's device.

    Raises:
        InputError: if the model cannot read them.
    """
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or tokens.numel() == 0 or not whole:
        raise InputError(
            "tokens must be integers of shape (batch, pos), with a prompt and a token at least, "
            f"but they are {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    decoder = cast(Any, model.hf).transformer
    n_positions, n_tokens = len(decoder.wpe.weight), len(decoder.wte.weight)
    if tokens.shape[1] > n_positions:
        raise InputError(
            f"The prompts have {tokens.shape[1]} tokens, but {model.name} has positions for "
            f"{n_positions}: shorten them."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= n_tokens:
        raise InputError(
            f"{model.name} has {n_tokens} tokens, and {low if low < 0 else high} is none of them: "
            "encode the prompts with its own tokenizer."
        )
    return tokens.to(model.device, torch.long)


def _check_means(
    model: HookedModel, means: Tensor, n_pos: int
) -> Float[Tensor, "layer pos head d_head"]:
    """Return the means if they fit the model and the prompts.

    Raises:
        InputError: naming both shapes otherwise.
    """
    g = model.geometry
    expected = (g.n_layers, n_pos, g.n_heads, g.d_head)
    if tuple(means.shape) != expected:
        raise InputError(
            f"means must have the shape (layer, pos, head, d_head), {expected} for this model and "
            f"these prompts, but it is {tuple(means.shape)}."
        )
    return means


def _check_sites(model: HookedModel, sites: object, n_pos: int, role: str) -> list[Site]:
    """Return heads with their positions counted from the start.

    Raises:
        InputError: naming the first site that the model or the prompts do not have.
    """
    found: list[Site] = []
    for site in sites if isinstance(sites, Iterable) else [sites]:
        if not (isinstance(site, Sequence) and len(site) == 2 and isinstance(site[0], Head)):
            example = "[[(cl.Head(3, 5), -1)]]" if role == "source" else "[(cl.Head(3, 5), -1)]"
            raise InputError(
                f"{site} is no {role}: give (head, position) pairs, as in {role}s={example}."
            )
        head, position = model.geometry.check(site[0]), site[1]
        if position is None and role == "source":
            found.append((head, None))
            continue
        try:
            index = operator.index(position)
        except TypeError as error:
            either = " or None for all positions" if role == "source" else ""
            raise InputError(
                f"The position of the {role} {head} must be an integer{either}, "
                f"but is {position!r}."
            ) from error
        if not -n_pos <= index < n_pos:
            raise InputError(
                f"The {role} {head} is at position {index}, but the prompts have {n_pos} tokens."
            )
        found.append((head, index % n_pos))
    return found
