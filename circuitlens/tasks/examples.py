"""Examples and pools.

Pool A serves competence, baseline and discovery; pool B serves transfer; every choice is made on
the validation split; the test split is reported once. Parallel corpora hold the same sentence in
every language under the same id, so the pool of an example follows from a hash of its id (of its
group where several examples share a sentence): whatever the language, whatever rows are missing,
a sentence and its translations are always on the same side.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from circuitlens.errors import InputError
from circuitlens.models.media import digest_of

__all__ = ["POOLS", "Example", "Pool", "Pools", "normal_text", "split_pools"]

logger = logging.getLogger(__name__)

Pool = Literal["pool_a", "pool_b", "validation", "test"]
POOLS: tuple[Pool, ...] = get_args(Pool)


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Attributes:
        id: unique within a language; equal ids in two languages of a parallel corpus mean the
            same sentence.
        fields: the texts by name, such as ``{"text": …}`` or ``{"premise": …, "hypothesis": …}``.
            For a speech or vision model ``"audio"`` and ``"image"`` can be among them: the path of
            a file (a ``pathlib.Path``), a :class:`circuitlens.Audio`, or a PIL image.
        label: the right label.
        group: what pools must not split; the id unless examples share a sentence.
        counterfactual: texts that replace those of the same name in the counterfactual
            prompt, where there is one (``reference="counterfactual"``).
    """

    id: str
    fields: Mapping[str, Any]
    label: str
    group: str = field(default="")
    counterfactual: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @property
    def text(self) -> str:
        """All fields as one string, for display."""
        return " / ".join(self.texts.values())

    @property
    def texts(self) -> Mapping[str, str]:
        """The fields that are texts."""
        return {n: v for n, v in self.fields.items() if isinstance(v, str)}


@dataclass(frozen=True)
class Pools:
    """The four pools of a task in one language."""

    pool_a: tuple[Example, ...]
    pool_b: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __repr__(self) -> str:
        return f"Pools({', '.join(f'{name}={len(getattr(self, name))}' for name in POOLS)})"

    def apart_from(self, other: Pools) -> Pools:
        """Leave out what is on another side in ``other``, usually another language.

        No group stays that is for training here and for evaluation there, or the other way
        round, or for validation in one and for test in the other.
        """
        training = {e.group for e in (*other.pool_a, *other.pool_b)}
        validation = {e.group for e in other.validation}
        test = {e.group for e in other.test}

        def keep(pool: tuple[Example, ...], elsewhere: set[str]) -> tuple[Example, ...]:
            return tuple(e for e in pool if e.group not in elsewhere)

        kept = Pools(
            pool_a=keep(self.pool_a, validation | test),
            pool_b=keep(self.pool_b, validation | test),
            validation=keep(self.validation, training | test),
            test=keep(self.test, training | validation),
        )
        dropped = self.size - kept.size
        logger.log(
            logging.WARNING if dropped else logging.DEBUG,
            "%d examples were left out because their ids are on the other side of the pools in "
            "the source language.",
            dropped,
        )
        return kept

    @property
    def size(self) -> int:
        """Number of examples in all pools."""
        return sum(map(len, (self.pool_a, self.pool_b, self.validation, self.test)))


def _unit_hash(seed: int, group: str) -> float:
    """Map a group to [0, 1), the same on every machine."""
    raw = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") / 2**64


def split_pools(
    splits: Mapping[str, Iterable[Example]], *, seed: int, share_a: float = 0.5
) -> Pools:
    """Distribute the splits of a data set over the pools.

    Args:
        splits: examples by ``train``, ``validation``, ``test``. A missing split is made by id:
            20 % of what is there become the test split, 10 % of the rest the validation split.
        seed: changes which ids go where.
        share_a: the share of the training examples that pool A gets; the rest is pool B.

    Raises:
        InputError: if an id occurs twice, or a share is not between 0 and 1.
    """
    if not 0 < share_a < 1:
        raise InputError(f"share_a must lie between 0 and 1, but is {share_a}.")
    have = {name: tuple(examples) for name, examples in splits.items()}
    seen: set[str] = set()
    for name, examples in have.items():
        for example in examples:
            if example.id in seen:
                raise InputError(
                    f"The id {example.id!r} occurs twice (again in {name}): make ids unique over "
                    "all splits, or have rows numbered within their split, id='' (--column id=)."
                )
            seen.add(example.id)
    train = have.get("train", ())
    for name, share in (("test", 0.2), ("validation", 0.1)):
        if name not in have:
            chosen = tuple(e for e in train if _unit_hash(seed, f"{name}:{e.group}") < share)
            taken = {e.id for e in chosen}
            have[name] = chosen
            train = tuple(e for e in train if e.id not in taken)
    test_groups, test_texts = (
        {e.group for e in have["test"]},
        {normal_text(e) for e in have["test"]},
    )
    have["validation"] = _leave_out(
        have["validation"],
        lambda e: e.group in test_groups or normal_text(e) in test_texts,
        "validation examples were left out: the same text or group is in test",
    )
    held_out = (*have["validation"], *have["test"])
    groups, texts = {e.group for e in held_out}, {normal_text(e) for e in held_out}
    train = _leave_out(
        train,
        lambda e: e.group in groups or normal_text(e) in texts,
        "training examples were left out: the same text or group is in validation or test",
    )
    in_a = {e.group: _unit_hash(seed, e.group) < share_a for e in train}
    pool_a = tuple(e for e in train if in_a[e.group])
    seen_texts = {normal_text(e) for e in pool_a}
    pool_b = _leave_out(
        tuple(e for e in train if not in_a[e.group]),
        lambda e: normal_text(e) in seen_texts,
        "pool-B examples were left out: the same text is in pool A",
    )
    return Pools(pool_a, pool_b, have["validation"], have["test"])


def _leave_out(
    examples: tuple[Example, ...], unwanted: Callable[[Example], bool], why: str
) -> tuple[Example, ...]:
    kept = tuple(e for e in examples if not unwanted(e))
    if len(kept) < len(examples):
        logger.warning("%d %s.", len(examples) - len(kept), why)
    return kept


def normal_text(example: Example) -> tuple[str, ...]:
    """Texts as they are compared: whatever Unicode form, case, spaces and invisible characters.

    Sounds and images are compared by what is in them.
    """
    fields = example.fields.items()
    return tuple(_normal(v) if isinstance(v, str) else digest_of(n, v) for n, v in fields)


def _normal(text: str) -> str:
    # Folding may undo the form, so it comes in between (Unicode's caseless compatibility match).
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(c for c in folded if unicodedata.category(c) != "Cf")
    return " ".join(visible.split())
