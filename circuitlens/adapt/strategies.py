"""What a transfer trains: one registry, one signature.

A strategy says which heads it is about (if any) and makes a :class:`Trainable` of a model: an
adapter on slices of heads, a LoRA adapter, or entries of the full weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from circuitlens.adapt.trainable import Trainable
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.models.batch import Readout
from circuitlens.models.geometry import norm_parameters
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores

if TYPE_CHECKING:
    from circuitlens.adapt.headslice import HeadSliceConfig

__all__ = [
    "AUTO",
    "NAMES",
    "STRATEGIES",
    "Choice",
    "KVPolicy",
    "Strategy",
    "look_of",
    "place_of",
    "strategy_of",
]

KVPolicy = Literal["shared", "group", "frozen"]


@dataclass(frozen=True)
class Choice:
    """What a strategy may choose from.

    Attributes:
        circuit: the heads that were found; other strategies take its size.
        scores: of all heads, for the strategies that need them.
        seed: for heads drawn at random and for adapters that begin at random.
        kv_policy: which key/value heads are trained under grouped-query attention.
        readout: of the task.
    """

    circuit: Circuit
    scores: HeadScores | None = None
    seed: int = 0
    kv_policy: KVPolicy = "shared"
    readout: Readout | None = None

    @property
    def ranked(self) -> HeadScores:
        """The scores.

        Raises:
            InputError: if there are none.
        """
        if self.scores is None:
            raise InputError("This strategy chooses by the heads' scores: pass scores=….")
        return self.scores


@dataclass(frozen=True)
class Strategy:
    """A named way to adapt a model.

    Attributes:
        name, description: for tables and reports.
        make: copies a model and says what of it is trained.
        heads: the heads that it trains, if it is about heads.
        gradual: trains in stages, with less and less source data among the target's.
        by_scores: chooses by the heads' scores.
        all_weights: trains every weight, which needs several times their memory.
        colour, symbol: of it in every figure, by plotly's names. Colours repeat, pairs do not.
    """

    name: str
    description: str
    make: Callable[[HookedModel, Choice, Circuit | None], Trainable]
    heads: Callable[[Choice], Circuit] | None = None
    gradual: bool = False
    by_scores: bool = False
    all_weights: bool = False
    colour: str = "#6b7280"
    symbol: str = "circle-open"

    def choose(self, choice: Choice) -> Circuit | None:
        """Return the heads that are trained; ``None`` where it is not about heads."""
        return None if self.heads is None else self.heads(choice)


def _slice_config(choice: Choice, heads: Circuit | None) -> HeadSliceConfig:
    from circuitlens.adapt.headslice import HeadSliceConfig

    return HeadSliceConfig(
        heads=tuple(map(str, heads or ())), kv_policy=choice.kv_policy, norms="all"
    )


def _slices(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    return Trainable.of_adapter(model, _slice_config(choice, heads), choice.seed)


def _everything(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.hf.named_parameters()}
    return Trainable.of_entries(model, masks)


def _lora(
    model: HookedModel, ranks: dict[str, int], seed: int, *, norms: bool = False
) -> Trainable:
    """LoRA on named modules, each with its rank; alpha is twice the rank. And, perhaps, norms."""
    from peft import LoraConfig

    # Peft reads keys of its patterns as regular expressions behind a dot.
    escaped = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=list(ranks),
        rank_pattern=escaped,
        alpha_pattern={name: 2 * rank for name, rank in escaped.items()},
        fan_in_fan_out=_transposed(model),
        modules_to_save=_norms(model) if norms else None,
    )
    return Trainable.of_adapter(model, config, seed)


def _norms(model: HookedModel) -> list[str]:
    """Modules that are norms of the residual stream."""
    return list(dict.fromkeys(n.rpartition(".")[0] for n in norm_parameters(model.hf)))


def _transposed(model: HookedModel) -> bool:
    return type(model.hf).__name__.startswith("GPT2")


def _projections(model: HookedModel, layer: int) -> list[str]:
    """Modules of a layer's q, k, v and o, each once."""
    slices = model.geometry.slices(Head(layer, 0))
    return list(dict.fromkeys(s.parameter.rsplit(".", 1)[0] for s in slices))


def _width(model: HookedModel, module: str) -> int:
    """Entries that one rank of LoRA adds to a module."""
    return sum(model.hf.get_submodule(module).weight.shape)


def _slice_entries(model: HookedModel, choice: Choice) -> int:
    """Entries of the slices that ``circuit`` would train under the same key/value policy."""
    from circuitlens.adapt.headslice import selected_slices

    parameters = dict(model.hf.named_parameters())
    pieces = selected_slices(model.geometry, _slice_config(choice, choice.circuit))
    return sum(piece.of(parameters[piece.parameter]).numel() for piece in pieces)


def _lora_of_rank(
    rank: int | None, *, norms: bool = False
) -> Callable[[HookedModel, Choice, Circuit | None], Trainable]:
    """LoRA on all attention projections; without a rank, as many entries as the circuit has."""

    def make(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
        modules = [
            m for layer in range(model.geometry.n_layers) for m in _projections(model, layer)
        ]
        budget = _slice_entries(model, choice)
        each = sum(_width(model, module) for module in modules)
        ranks = dict.fromkeys(modules, rank or max(1, round(budget / each)))
        return _lora(model, ranks, choice.seed, norms=norms)

    return make


def _circuit_lora(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """LoRA on layers of the circuit, ranks by their share of its relevance, its size in all."""
    scores = choice.ranked.mean
    weight: dict[int, float] = {}
    for head in choice.circuit:
        gain = max(0.0, float(scores[head.layer, head.index]))
        weight[head.layer] = weight.get(head.layer, 0.0) + gain
    total = sum(weight.values())
    if total <= 0:
        raise InputError(
            "No head of the circuit has a positive score, so ranks cannot follow relevance: "
            "choose another circuit or strategy='lora'."
        )
    budget = _slice_entries(model, choice)
    ranks: dict[str, int] = {}
    for layer, gain in weight.items():
        modules = _projections(model, layer)
        each = sum(_width(model, module) for module in modules)
        ranks |= dict.fromkeys(modules, max(1, round(budget * gain / total / each)))
    return _lora(model, ranks, choice.seed)


def _label_rows(model: HookedModel, choice: Choice, heads: Circuit | None) -> Trainable:
    """What of the model's head belongs to the labels."""
    assert choice.readout is not None
    return Trainable.of_entries(model, choice.readout.head_masks(model.hf))


STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy(
            "circuit",
            "the circuit's slices of q, k, v, o, and all norms",
            _slices,
            heads=lambda c: c.circuit,
            colour="#0072B2",
            symbol="circle",
        ),
        Strategy(
            "near-zero",
            "as many heads with relevance nearest to zero, and all norms",
            _slices,
            heads=lambda c: c.ranked.near_zero(len(c.circuit)),
            by_scores=True,
            colour="#D55E00",
            symbol="diamond",
        ),
        Strategy(
            "random",
            "as many heads drawn at random, and all norms",
            _slices,
            heads=lambda c: c.circuit.random_like(c.seed),
            colour="#009E73",
            symbol="square",
        ),
        Strategy(
            "random-by-layer",
            "heads drawn at random, as many in every layer as the circuit has, and all norms",
            _slices,
            heads=lambda c: c.circuit.random_like(c.seed, by_layer=True),
            colour="#CC79A7",
            symbol="triangle-up",
        ),
        Strategy(
            "norms",
            "all norms only",
            _slices,
            colour="#E69F00",
            symbol="cross",
        ),
        Strategy(
            "lora",
            "LoRA on all attention projections, with about as many entries as the circuit's slices",
            _lora_of_rank(None),
            colour="#56B4E9",
            symbol="x",
        ),
        Strategy(
            "lora-norms",
            "as lora, and all norms",
            _lora_of_rank(None, norms=True),
            colour="#56B4E9",
            symbol="star-diamond",
        ),
        Strategy(
            "lora-r8",
            "LoRA of rank 8 on all attention projections",
            _lora_of_rank(8),
            colour="#8C6D46",
            symbol="star",
        ),
        Strategy(
            "circuit-lora",
            "LoRA on the circuit's layers, ranks by their share of its relevance",
            _circuit_lora,
            by_scores=True,
            colour="#0072B2",
            symbol="triangle-down",
        ),
        Strategy(
            "gradual",
            "all weights, in stages with less and less source data among the target's",
            _everything,
            gradual=True,
            all_weights=True,
            colour="#D55E00",
            symbol="pentagon",
        ),
        Strategy(
            "head",
            "the output layer's rows of the labels only",
            _label_rows,
            colour="#009E73",
            symbol="hourglass",
        ),
        Strategy(
            "full",
            "all weights",
            _everything,
            all_weights=True,
            colour="#CC79A7",
            symbol="hexagon",
        ),
    )
}


# Not a strategy of its own: it chooses one.
AUTO = "auto"
_AUTO_LOOK = ("#E69F00", "bowtie")
NAMES = (*STRATEGIES, AUTO)


def look_of(name: str) -> tuple[str, str] | None:
    """Colour and symbol of a strategy in figures; ``None`` for an unknown one."""
    if name == AUTO:
        return _AUTO_LOOK
    known = STRATEGIES.get(name)
    return (known.colour, known.symbol) if known else None


def place_of(name: str) -> tuple[int, str]:
    """Sort key of strategies: the order of the registry, then ``auto``, then unknown ones."""
    return (NAMES.index(name) if name in NAMES else len(NAMES)), name


def strategy_of(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        InputError: if there is none of that name; the names that :func:`circuitlens.transfer` and
            :func:`circuitlens.compare` take are listed.
    """
    if name == AUTO:
        raise InputError(
            f"{AUTO!r} chooses a strategy and is none itself: give it to transfer or compare."
        )
    if name not in STRATEGIES:
        raise InputError(f"There is no strategy {name!r}; known are {', '.join(NAMES)}.")
    return STRATEGIES[name]
