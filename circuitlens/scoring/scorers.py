"""The scorers: named ways to score every head, behind one registry.

Most score a batch by itself; ``greedy`` ranks heads on all examples together. Rule sets of the
engine (:data:`circuitlens.RULES`) are scorers too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf, isfinite, log

import torch
from torch import Tensor

from circuitlens.cdt import (
    RULES,
    Relevances,
    RuleSet,
    decompose,
    relevance_along_path,
    relevance_by_difference,
    relevance_by_gradient,
)
from circuitlens.cdt.ablation import PrefixCache, ablated_label_logits
from circuitlens.errors import InputError, check_choice
from circuitlens.models.batch import Batch, Readout, margin
from circuitlens.models.hooked import HookedModel
from circuitlens.node_means import NodeMeans
from circuitlens.scoring.choosing import SHARES, areas, mlp_effects
from circuitlens.scoring.request import Request, Scored
from circuitlens.scoring.rounds import iterative, sampled

__all__ = ["METHODS", "SCORERS", "Scorer", "scorer"]


BatchScorer = Callable[[HookedModel, Batch, NodeMeans, Request], Relevances]
# Of the number of layers, of heads in a layer, and what is asked.
Passes = Callable[[int, int, Request], tuple[float, float]]
SetScorer = Callable[[HookedModel, list[Batch], NodeMeans, Request], Scored]


@dataclass(frozen=True)
class Scorer:
    """A named way to score heads.

    Attributes:
        name, description: for tables and reports.
        batch: scores the examples of a batch, or
        whole: scores all batches together.
        shared: all examples have the same score, so that there is no spread over them.
        mlps, by_position, direct: whether it can do what these requests ask.
        joint: scoring MLPs too changes the scores of heads, because both are moved together.
        unit: of the scores.
        only: class of the models that it knows, if it does not know all.
        readouts: names of the readouts that it knows, if it does not know all.
        most_heads: larger models take too long, so that comparisons leave it out.
        control: says nothing about a model.
        cheap: a few passes give all heads, so that an explorer may compute it on a click.
        passes: forward and backward passes of an example that scoring takes, at most.
    """

    name: str
    description: str
    batch: BatchScorer | None = None
    whole: SetScorer | None = None
    shared: bool = False
    mlps: bool = False
    by_position: bool = False
    direct: bool = False
    joint: bool = False
    unit: str = "logits"
    cheap: bool = False
    only: str | None = None
    readouts: tuple[str, ...] = ()
    most_heads: int | None = None
    control: bool = False
    passes: Passes = lambda _layers, _heads, _request: (1.0, 1.0)

    def suits(self, model: HookedModel, readout: Readout) -> bool:
        """Whether a comparison of scorers on this model and readout should have it."""
        known = self.only in (None, type(model.hf).__name__) and self._reads(readout)
        quick = self.most_heads is None or len(model.geometry) <= self.most_heads
        return known and quick and not self.control

    def _reads(self, readout: Readout) -> bool:
        return not self.readouts or readout.name in self.readouts

    def check_readout(self, readout: Readout) -> None:
        """Reject answers that this scorer does not know how to read.

        Raises:
            InputError: naming the readout.
        """
        if not self._reads(readout):
            raise InputError(
                f"{self.name} knows how {', '.join(self.readouts)} readouts are made of the heads' "
                f"outputs, but not the {readout.name!r} readout of this task and model: choose "
                "another method, such as cdt-linear."
            )

    def check(self, request: Request) -> None:
        """Reject what this scorer cannot do.

        Raises:
            InputError: naming the request and scorers that can.
        """
        asked = {
            "mlps": request.mlps,
            "by_position": request.by_position,
            "direct": request.path == "direct",
        }
        if self.name == "auto":
            known = [s.name for s in SCORERS.values() if s.name != "auto" and not s.control]
            for name in request.candidates:
                check_choice("candidates", name, known)
        for what, wanted in asked.items():
            if wanted and not getattr(self, what):
                able = ", ".join(s.name for s in SCORERS.values() if getattr(s, what))
                words = {
                    "mlps": "mlps=True",
                    "by_position": "by_position=True",
                    "direct": "path='direct'",
                }[what]
                raise InputError(f"{self.name} cannot do {words}; these can: {able}.")


def _by_rules(
    rules: RuleSet, model: HookedModel, batch: Batch, means: NodeMeans, request: Request
) -> Relevances:
    shared = {
        "positions": request.positions,
        "mlps": request.mlps,
        "by_position": request.by_position,
    }
    if rules.activation == "difference":
        return relevance_by_difference(
            model,
            batch,
            means,
            rules,
            budget=request.budget,
            **shared,  # type: ignore[arg-type]
        )
    return relevance_by_gradient(model, batch, means, rules, path=request.path, **shared)  # type: ignore[arg-type]


def _path(
    model: HookedModel, batch: Batch, means: NodeMeans, request: Request, steps: int | None = None
) -> Relevances:
    return relevance_along_path(
        model,
        batch,
        means,
        steps=steps or request.steps,
        positions=request.positions,
        mlps=request.mlps,
        by_position=request.by_position,
    )


def _direct(model: HookedModel, batch: Batch, means: NodeMeans, request: Request) -> Relevances:
    # With every later node held, all that is left between a head and the logits are norms.
    found = relevance_by_gradient(
        model,
        batch,
        means,
        RULES["cdt-linear"],
        positions=request.positions,
        mlps=True,
        by_position=request.by_position,
        path="direct",
    )
    return Relevances(found.heads, found.mlps if request.mlps else None, found.by_position)


def _published(model: HookedModel, batch: Batch, means: NodeMeans, request: Request) -> Relevances:
    """Decompose prompt by prompt, because the published rules know no padding."""
    g = model.geometry
    scores = []
    where = batch.mask(request.positions)
    for row in range(len(batch)):
        length = int(batch.attention_mask[row].sum())
        columns = (where[row, -length:].nonzero()[:, 0]).tolist()
        like = torch.zeros(1, length, g.n_heads, g.d_head, device=model.device)
        mean = torch.stack(
            [means.of_heads(layer, like).expand(length, -1, -1) for layer in range(g.n_layers)]
        )
        found = decompose(
            model,
            batch.input_ids[row : row + 1, -length:],
            [[(head, column) for column in columns] for head in g],
            mean,
            "hsu2024",
            batch_size=request.budget.rows,
            quiet=True,
        )
        labels = batch.readout.of_labels(found.relevant)
        scores.append(margin(labels, batch.gold[row : row + 1])[:, 0])
    return Relevances(torch.stack(scores).unflatten(1, (g.n_layers, g.n_heads)))


def _greedy(model: HookedModel, batches: list[Batch], means: NodeMeans, request: Request) -> Scored:
    """Remove heads one at a time, always the one whose loss costs the margin least.

    The score of a head is the share of heads that were removed before it, so the ranking is the
    order of elimination, backwards.
    """
    g = model.geometry
    heads = list(g)
    keep = torch.ones(g.n_layers, g.n_heads, dtype=torch.bool)
    scores = torch.zeros(g.n_layers, g.n_heads)
    prefixes = [PrefixCache.capture(model, batch, rows=request.budget) for batch in batches]
    for step in range(len(heads)):
        left = [head for head in heads if keep[head.layer, head.index]]
        candidates = keep.expand(len(left), -1, -1).clone()
        for k, head in enumerate(left):
            candidates[k, head.layer, head.index] = False
        total = torch.zeros(len(left), dtype=torch.float64)
        for batch, prefix in zip(batches, prefixes, strict=True):
            labels = ablated_label_logits(
                model,
                batch,
                candidates,
                means,
                request.positions,
                prefix=prefix,
                rows=request.budget,
            )
            total += margin(labels, batch.gold).double().sum(1).cpu()
        cheapest = left[int(total.argmax())]
        keep[cheapest.layer, cheapest.index] = False
        scores[cheapest.layer, cheapest.index] = step / len(heads)
    return Scored(scores)


def _auto(model: HookedModel, batches: list[Batch], means: NodeMeans, request: Request) -> Scored:
    """Take the candidate whose circuits keep most (:mod:`circuitlens.scoring.choosing`)."""
    plain = replace(request, mlps=False)
    values: dict[str, Tensor] = {}
    # Those of all examples first: what comes on their way need not be computed again.
    for name in sorted(request.candidates, key=lambda name: SCORERS[name].whole is None):
        by = SCORERS[name]
        if by.whole is not None:
            found = by.whole(model, batches, means, plain)
            values |= {**found.stages, name: found.heads}
        elif name not in values:
            assert by.batch is not None
            values[name] = torch.cat([by.batch(model, b, means, plain).heads for b in batches])
    mean = {name: v.float().cpu().view(-1, *v.shape[-2:]).mean(0) for name, v in values.items()}
    measured = areas(model, batches, means, request, mean)
    # None where f has no meaning, for files; if it never has, the first is taken.
    known = {name: f if isfinite(f) else None for name, f in measured.items()}
    best = max(known, key=lambda name: -inf if (f := known[name]) is None else f)
    mlps = None
    if request.mlps:
        mlps = torch.cat([mlp_effects(model, b, means, request) for b in batches]).float().cpu()
    details = {"chosen": best, "mean_f": known}
    return Scored(values[best].detach().float().cpu(), mlps=mlps, details=details)


def _by_head(layers: int, heads: int, request: Request) -> tuple[float, float]:
    # A head of layer l is moved in a run of the layers from l on. The clean run comes twice: where
    # parts are held, it is run with these too.
    moved = heads + int(request.mlps)
    return 2 + moved * (layers + 1) / 2, 0.0


def _sampled(layers: int, heads: int, request: Request) -> tuple[float, float]:
    return request.rounds + 1.0, request.rounds + 1.0


def _iterative(layers: int, heads: int, request: Request) -> tuple[float, float]:
    # Until a tenth of the heads is left.
    rounds = 1.0 + ceil(log(0.1) / log(1 - request.share))
    return rounds, rounds


def _choosing(layers: int, heads: int, request: Request) -> tuple[float, float]:
    names = request.candidates
    each = [SCORERS[name].passes(layers, heads, request) for name in names]
    forward, backward = (sum(passes) for passes in zip(*each, strict=True))
    # The clean run, that without heads, and the circuits; ``sampled`` brings ``cdt-linear``.
    rankings = len({*names, "cdt-linear"}) if "sampled" in names else len(names)
    measured = 2.0 + len(SHARES) * rankings
    return forward + measured + request.mlps * (2 + (layers + 1) / 2), backward


def _along_path(layers: int, heads: int, request: Request) -> tuple[float, float]:
    return request.steps + 1.0, float(request.steps)


def _rule_scorer(name: str, description: str) -> Scorer:
    gradient = RULES[name].activation != "difference"
    return Scorer(
        name,
        description,
        batch=partial(_by_rules, RULES[name]),
        mlps=True,
        by_position=True,
        direct=gradient,
        cheap=gradient,
        **({} if gradient else {"passes": _by_head}),  # type: ignore[arg-type]
    )


SCORERS: dict[str, Scorer] = {
    s.name: s
    for s in (
        _rule_scorer("cdt", "patterns and norm scales frozen, activations by difference"),
        _rule_scorer(
            "cdt-linear",
            "patterns and norm scales frozen, activations by secant, one backward",
        ),
        _rule_scorer("cdt-live", "patterns frozen, norm scales live, activations by difference"),
        Scorer(
            "hsu2024",
            "the published CD-T rules, implemented exactly (GPT-2)",
            batch=_published,
            only="GPT2LMHeadModel",
            readouts=("token",),
            # Relevant and irrelevant part of every node.
            passes=lambda layers, heads, _: (2.0 * layers * heads, 0.0),
        ),
        _rule_scorer("attribution", "gradient × deviation from the mean, nothing frozen"),
        Scorer(
            "midpoint",
            "gradient × deviation half way between all heads at their means and the clean run",
            batch=partial(_path, steps=1),
            mlps=True,
            by_position=True,
            joint=True,
            cheap=True,
            passes=lambda *_: (2.0, 1.0),
        ),
        Scorer(
            "integrated-gradients",
            "gradient × deviation, averaged from all heads at their means to the clean run",
            batch=_path,
            mlps=True,
            by_position=True,
            joint=True,
            passes=_along_path,
        ),
        Scorer(
            "dla",
            "direct logit attribution of the deviation, through the frozen final norm",
            batch=_direct,
            mlps=True,
            by_position=True,
            cheap=True,
        ),
        Scorer(
            "sampled",
            "gradient × deviation in random circuits of the ranking so far",
            whole=sampled,
            passes=_sampled,
        ),
        Scorer(
            "iterative",
            "cdt-linear, with the worst heads set to their means, round after round",
            whole=iterative,
            shared=True,
            unit="share of heads taken away before",
            passes=_iterative,
        ),
        Scorer(
            "auto",
            "of cdt-linear and sampled, the one whose circuits keep most on discovery examples",
            whole=_auto,
            mlps=True,
            passes=_choosing,
        ),
        _rule_scorer("ablation", "exact mean ablation, one head at a time"),
        Scorer(
            "greedy",
            "backward elimination by exact mean ablation; scores are ranks (small models)",
            whole=_greedy,
            shared=True,
            unit="share of heads taken away before",
            most_heads=64,
            passes=lambda layers, heads, _: (1 + layers * heads * (layers * heads + 1) / 2, 0.0),
        ),
        Scorer(
            "random",
            "random numbers, as a control",
            unit="random numbers",
            control=True,
            shared=True,
            passes=lambda *_: (0.0, 0.0),
        ),
    )
}

METHODS: dict[str, str] = {s.name: s.description for s in SCORERS.values()}


def scorer(method: str | RuleSet) -> Scorer:
    """Look up a scorer, or make one from a rule set.

    Raises:
        InputError: if there is none of that name (the known ones are listed), or a rule set has
            the name of another scorer, whose place it would take in tables and files.
    """
    if isinstance(method, RuleSet) and method != RULES.get(method.name):
        if method.name in SCORERS:
            raise InputError(
                f"There already is a method {method.name!r}, and this rule set is another: rename "
                "it, as in dataclasses.replace(rules, name='mine')."
            )
        return Scorer(
            method.name,
            "your own rule set",
            batch=partial(_by_rules, method),
            mlps=True,
            by_position=True,
            direct=method.activation != "difference",
            **({"passes": _by_head} if method.activation == "difference" else {}),  # type: ignore[arg-type]
        )
    name = method.name if isinstance(method, RuleSet) else method
    check_choice("method", name, SCORERS)
    return SCORERS[name]
