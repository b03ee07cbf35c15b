"""The published CD-T, implemented exactly: Hsu et al. 2024, arXiv 2407.00886.

Every activation is a pair (r, i), relevant and irrelevant, that adds up to the clean activation.

1. Start: i is the embedding, r is 0.
2. Every map of the network has a rule that makes the pair of its output from that of its input
   (:mod:`circuitlens.cdt.pairs`). Attention has a pattern of the total and one of r alone.
3. At a source (a head's output z at a position) the deviation from the mean becomes relevant and
   the mean irrelevant. Whatever is relevant further up stems from sources.
4. End: the pair of the logits at the last position.

Unlike the other engines this one freezes nothing, and it needs to know every map of the
network, so it reads the weights of a GPT-2 instead of speaking hooks.

Below the lowest source r stays 0, so those layers are computed once for all source sets. They are
computed by the rules nevertheless: TOL takes a little from biases, so i is not quite the clean
activation there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from circuitlens.cdt.decomposition import Decomposition, check_heads, check_means, check_tokens
from circuitlens.cdt.gpt2 import PairedGPT2
from circuitlens.models.hooked import HookedModel
from circuitlens.utils.progress import progress

__all__ = ["decompose_published"]


@torch.no_grad()
def decompose_published(
    model: HookedModel,
    tokens: Tensor,
    sources: Iterable[object],
    means: Tensor,
    targets: object,
    batch_size: int,
    quiet: bool,
) -> Decomposition:
    """:func:`circuitlens.decompose` by the published rules, with arguments yet to be checked."""
    network = PairedGPT2(model)
    check_tokens(model, tokens)
    means = check_means(model, means, tokens.shape[1]).to(network.device, network.dtype)
    sets = [check_heads(model, s, tokens.shape[1], "source") for s in sources]
    sites = check_heads(model, targets or (), tokens.shape[1], "target")
    tokens = tokens.to(model.device, torch.long)

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
        relevant=logits.relevant,
        total=logits.total,
        target_relevant=z_targets.relevant,
        target_total=z_targets.total,
    )
