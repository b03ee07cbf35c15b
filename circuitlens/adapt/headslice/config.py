"""What a head-slice adapter trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig, PeftType

from circuitlens.adapt.headslice.registration import METHOD
from circuitlens.errors import InputError
from circuitlens.nodes import Head

__all__ = ["KV_POLICIES", "NORMS", "HeadSliceConfig"]

_PROJECTIONS = ("q", "k", "v", "o")
OUTPUTS = ("scale", "offset")
KV_POLICIES = ("shared", "group", "frozen")
NORMS = ("all", "circuit", "none")


@dataclass
class HeadSliceConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a head-slice adapter (CT-SFT, arXiv 2601.08146, as an adapter).

    Attributes:
        heads: the heads to train, names such as ``"a3.h5"`` or :class:`circuitlens.Head`; a
            :class:`circuitlens.Circuit` will do. Kept as names, sorted and without repetition.
        projections: which of a head's slices are trained: rows of ``"q"``, ``"k"`` and ``"v"``,
            columns of ``"o"``.
        outputs: what is trained of a head's output, before W_O: ``"scale"``, one factor (1 plus
            what is trained), or ``"offset"``, a vector that is added (LoFiT, arXiv 2406.01563).
            Not together with the projection ``"o"``, whose columns would do the same twice.
        kv_policy: what happens to a key/value head that query heads share (grouped-query
            attention): ``"shared"`` trains it if any of them is chosen, ``"group"`` if all of
            them are, ``"frozen"`` never (nor the keys and values of any other model).
        norms: which norms of the residual stream are trained: ``"all"``, ``"circuit"`` (those of
            layers with a chosen head, and the final one) or ``"none"``.
        biases: train the biases of the trained rows, where the model has any. (The bias of W_O
            belongs to no head; those of norms go with the norms.)
        qk_norms: count the norms of queries and keys among ``norms``. They are shared by all heads
            of a layer, or mix them.

    Raises:
        InputError: for a head that is not a head's name, an unknown choice, or nothing to train.
    """

    heads: Iterable[str | Head] = ()
    projections: Iterable[str] = _PROJECTIONS
    outputs: Iterable[str] = ()
    kv_policy: str = "shared"
    norms: str = "all"
    biases: bool = True
    qk_norms: bool = False
    # PEFT reads this name from every configuration; here the modules follow from the heads.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD.upper()]
        names = (self.heads,) if isinstance(self.heads, str) else self.heads
        heads = {h if isinstance(h, Head) else Head.parse(h) for h in names}
        self.heads = tuple(map(str, sorted(heads)))
        self.projections = _among("projection", self.projections, _PROJECTIONS)
        self.outputs = _among("output", self.outputs, OUTPUTS)
        if self.outputs and "o" in self.projections:
            raise InputError(
                "A head's output and its columns of o cannot be trained together: leave 'o' out of "
                "projections, or give no outputs."
            )
        for name, known in (("kv_policy", KV_POLICIES), ("norms", NORMS)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"There is no {name} {value!r}; use one of {', '.join(known)}.")
        if heads and not self.projections and not self.outputs:
            raise InputError("No projection of the heads is chosen; give some of q, k, v and o.")
        if not heads and self.norms == "none":
            raise InputError(
                'The adapter has neither heads nor norms to train: give heads=…, or norms="all".'
            )
        # Heads of single tokens are not read by any readout. That of SEQ_CLS stays as it is.
        if str(self.task_type).endswith(("TOKEN_CLS", "QUESTION_ANS")):
            raise InputError(
                f"task_type={self.task_type} needs an output layer that is trained too, and a head "
                "slice adapter trains none: give the labels words and use the language model."
            )
        if self.qk_norms and self.norms == "none":
            raise InputError(
                'qk_norms=True trains nothing with norms="none": choose norms="all" or "circuit".'
            )

    @property
    def chosen(self) -> tuple[Head, ...]:
        """The heads as :class:`circuitlens.Head`."""
        return tuple(h if isinstance(h, Head) else Head.parse(h) for h in self.heads)


def _among(what: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The given names in the order of the known ones.

    Raises:
        InputError: for one that is not known.
    """
    wanted = set(given)
    for kind in sorted(wanted - set(known)):
        raise InputError(f"There is no {what} {kind!r}; use one of {', '.join(known)}.")
    return tuple(kind for kind in known if kind in wanted)
