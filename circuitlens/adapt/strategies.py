"""What a transfer trains: one registry, one signature.

A strategy says which heads it is about (if any) and makes a :class:`Trainable` of a model: an
adapter on slices of heads, a LoRA adapter, or entries of the full weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from circuitlens.adapt.changed_edges import edge_changed_layers
from circuitlens.adapt.choice import Choice, KVPolicy
from circuitlens.adapt.makers import (
    Maker,
    by_peft,
    circuit_lora,
    everything,
    label_rows,
    lora_of_rank,
    of_outputs,
    slices,
)
from circuitlens.adapt.neuron_entries import relevant_neurons
from circuitlens.adapt.rivals import lottery, shield
from circuitlens.adapt.selections import changed_layers, pulled_heads, relevant_layers
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError, first_line
from circuitlens.models.hooked import HookedModel
from circuitlens.utils.storage import digest

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

# What a configuration says of the adapter that it was saved with.
_NOT_ASKED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "revision"}
# Before the path of a configuration of PEFT.
_PEFT_FILE = "peft:"


@dataclass(frozen=True)
class Strategy:
    """A named way to adapt a model.

    Attributes:
        name, description: for tables and reports.
        make: copies a model and says what of it is trained.
        heads: the heads that it trains, if it is about heads.
        gradual: trains in stages, with less and less source data among the target's.
        by_circuit: trains the circuit's heads.
        by_scores: chooses by the heads' scores.
        by_source: looks at the source's data.
        trains_first: trains all weights once at one rate, to find out what is to be trained.
        all_weights: trains every weight, which needs several times their memory.
        colour, symbol: of it in every figure, by plotly's names. Colours repeat, pairs do not.
    """

    name: str
    description: str
    make: Maker
    heads: Callable[[HookedModel, Choice], Circuit] | None = None
    gradual: bool = False
    by_circuit: bool = False
    by_scores: bool = False
    by_source: bool = False
    trains_first: bool = False
    all_weights: bool = False
    colour: str = "#6b7280"
    symbol: str = "circle-open"

    def choose(self, model: HookedModel, choice: Choice) -> Circuit | None:
        """Return the heads that are trained; ``None`` where it is not about heads."""
        return None if self.heads is None else self.heads(model, choice)


STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy(
            "circuit",
            "the circuit's slices of q, k, v, o, and all norms",
            slices,
            heads=lambda _, c: c.circuit,
            by_circuit=True,
            colour="#0072B2",
            symbol="circle",
        ),
        Strategy(
            "near-zero",
            "as many heads with relevance nearest to zero, and all norms",
            slices,
            heads=lambda _, c: c.ranked.near_zero(len(c.circuit)),
            by_scores=True,
            colour="#D55E00",
            symbol="diamond",
        ),
        Strategy(
            "random",
            "as many heads drawn at random, and all norms",
            slices,
            heads=lambda _, c: c.circuit.random_like(c.seed),
            colour="#009E73",
            symbol="square",
        ),
        Strategy(
            "random-by-layer",
            "heads drawn at random, as many in every layer as the circuit has, and all norms",
            slices,
            heads=lambda _, c: c.circuit.random_like(c.seed, by_layer=True),
            colour="#CC79A7",
            symbol="triangle-up",
        ),
        Strategy(
            "norms",
            "all norms only",
            slices,
            colour="#E69F00",
            symbol="cross",
        ),
        Strategy(
            "lora",
            "LoRA on all attention projections, with about as many entries as the circuit's slices",
            lora_of_rank(None),
            colour="#56B4E9",
            symbol="x",
        ),
        Strategy(
            "lora-norms",
            "as lora, and all norms",
            lora_of_rank(None, norms=True),
            colour="#56B4E9",
            symbol="star-diamond",
        ),
        Strategy(
            "lora-r8",
            "LoRA of rank 8 on all attention projections",
            lora_of_rank(8),
            colour="#8C6D46",
            symbol="star",
        ),
        Strategy(
            "circuit-lora",
            "LoRA on the circuit's layers, ranks by their share of its relevance",
            circuit_lora(relevant_layers),
            by_scores=True,
            colour="#0072B2",
            symbol="triangle-down",
        ),
        Strategy(
            "circuit-lora-change",
            "LoRA on all layers, ranks by how much relevance differs between source and target",
            circuit_lora(changed_layers),
            by_scores=True,
            by_source=True,
            colour="#0072B2",
            symbol="triangle-left",
        ),
        Strategy(
            "circuit-lora-edges",
            "LoRA on all layers, ranks by how much edges between heads change in a full training",
            circuit_lora(edge_changed_layers),
            by_source=True,
            trains_first=True,
            all_weights=True,
            colour="#0072B2",
            symbol="pentagon-open",
        ),
        Strategy(
            "head-scale",
            "one factor for the output of every head, nothing else",
            of_outputs("scale"),
            colour="#009E73",
            symbol="triangle-right",
        ),
        Strategy(
            "head-bias",
            "one vector added to the output of each head of the circuit, nothing else (LoFiT)",
            of_outputs("offset"),
            heads=lambda _, c: c.circuit,
            by_circuit=True,
            colour="#8C6D46",
            symbol="star-square",
        ),
        Strategy(
            "fisher",
            "as many heads with the largest squared gradients on the target, and all norms",
            slices,
            heads=pulled_heads("fisher"),
            colour="#E69F00",
            symbol="octagon",
        ),
        Strategy(
            "fisher-layers",
            "as many heads, in layers with the largest squared gradients, and all norms",
            slices,
            heads=pulled_heads("fisher", layers=True),
            colour="#E69F00",
            symbol="hexagon2",
        ),
        Strategy(
            "weight-gradient",
            "as many heads with the largest |weight x gradient| on the target, and all norms",
            slices,
            heads=pulled_heads("weight-gradient"),
            colour="#56B4E9",
            symbol="star-triangle-up",
        ),
        Strategy(
            "weight-gradient-layers",
            "as many heads, in layers with the largest |weight x gradient|, and all norms",
            slices,
            heads=pulled_heads("weight-gradient", layers=True),
            colour="#56B4E9",
            symbol="star-triangle-down",
        ),
        Strategy(
            "lost-relevance",
            "as many heads that lose most relevance from source to target, and all norms",
            slices,
            heads=pulled_heads("lost-relevance"),
            by_scores=True,
            by_source=True,
            colour="#8C6D46",
            symbol="triangle-ne",
        ),
        Strategy(
            "lost-relevance-layers",
            "as many heads, in layers that lose most relevance, and all norms",
            slices,
            heads=pulled_heads("lost-relevance", layers=True),
            by_scores=True,
            by_source=True,
            colour="#8C6D46",
            symbol="triangle-sw",
        ),
        Strategy(
            "neurons",
            "MLP neurons with the largest relevance in the source, as many entries as the circuit "
            "has, and all norms",
            relevant_neurons,
            by_source=True,
            colour="#009E73",
            symbol="triangle-nw",
        ),
        Strategy(
            "lottery",
            "as many single entries as the circuit's slices, those that full training moved most "
            "(LT-SFT), and all norms",
            lottery,
            all_weights=True,
            trains_first=True,
            colour="#D55E00",
            symbol="diamond-tall",
        ),
        Strategy(
            "shield",
            "all weights but the half of the columns that matter most for the source (SSU)",
            shield,
            by_source=True,
            all_weights=True,
            colour="#CC79A7",
            symbol="triangle-se",
        ),
        Strategy(
            "gradual",
            "all weights, in stages with less and less source data mixed into the target's",
            everything,
            gradual=True,
            all_weights=True,
            colour="#D55E00",
            symbol="pentagon",
        ),
        Strategy(
            "head",
            "the output layer's rows of the labels only",
            label_rows,
            colour="#009E73",
            symbol="hourglass",
        ),
        Strategy(
            "full",
            "all weights",
            everything,
            all_weights=True,
            colour="#CC79A7",
            symbol="hexagon",
        ),
    )
}


# Not itself a strategy: it chooses one.
AUTO = "auto"
_LOOKS = {
    AUTO: ("#E69F00", "bowtie"),
    # Not strategies: rivals that are fitted alongside them.
    "majority": ("#6b7280", "diamond-wide"),
    "n-grams": ("#6b7280", "hexagram"),
}
NAMES = (*STRATEGIES, AUTO)


def look_of(name: str) -> tuple[str, str] | None:
    """Colour and symbol of a strategy in figures; ``None`` for an unknown one."""
    if name in _LOOKS:
        return _LOOKS[name]
    known = STRATEGIES.get(name)
    return (known.colour, known.symbol) if known else None


def place_of(name: str) -> tuple[int, str]:
    """Sort key of strategies: the order of the registry, then ``auto``, then unknown ones."""
    return (NAMES.index(name) if name in NAMES else len(NAMES)), name


def strategy_of(name: Any) -> Strategy:
    """Look up a strategy.

    Args:
        name: of the registry; ``"peft:config.json"``, a file that PEFT wrote; or a configuration of
            PEFT, such as ``peft.ShiraConfig(…)``.

    Raises:
        InputError: if there is none of that name (the names that :func:`circuitlens.transfer` and
            :func:`circuitlens.compare` take are listed), or for a configuration that cannot be
            used.
    """
    if isinstance(name, Strategy):
        return name
    if not isinstance(name, str):
        return _of_config(name)
    if name == AUTO:
        raise InputError(
            f"{AUTO!r} chooses a strategy and is none itself: give it to transfer or compare."
        )
    if name.startswith(_PEFT_FILE):
        return _of_config(_read_config(Path(name.removeprefix(_PEFT_FILE))))
    if name not in STRATEGIES:
        raise InputError(
            f"There is no strategy {name!r}; use one of {', '.join(NAMES)}, or "
            f"{_PEFT_FILE}FILE.json for a configuration of PEFT."
        )
    return STRATEGIES[name]


def _of_config(config: Any) -> Strategy:
    """The strategy of a configuration of PEFT, named by its method and its content."""
    from peft import PeftConfig

    if not isinstance(config, PeftConfig):
        raise InputError(
            "strategy is a name or a configuration of PEFT, such as peft.ShiraConfig(…), but got a "
            f"{type(config).__name__}."
        )
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"PEFT's {method} puts its own tokens before the prompt, where answers are read by "
            "their places: choose a method that changes weights."
        )
    content = json.dumps(config.to_dict(), sort_keys=True, default=_plain)
    return Strategy(
        f"peft-{method}-{digest(content)[:6]}", f"PEFT's {method}, as configured", by_peft(config)
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _read_config(path: Path) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import circuitlens.adapt.headslice  # noqa: F401  (makes its method known to PEFT)

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[content["peft_type"]]
        known = {field.name for field in fields(kind) if field.init}
        # PEFT warns of a field that it does not know, and ignores it.
        if unknown := sorted(set(content) - known - {"peft_type"}):
            raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}")
        return kind(**{k: v for k, v in content.items() if k in known - _NOT_ASKED})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is not a PEFT configuration ({first_line(error)}): write one with "
            "config.save_pretrained(…), or give its fields as JSON, peft_type among them."
        ) from error
