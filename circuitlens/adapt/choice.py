"""What a strategy may choose from: the circuit, the scores, and the data of the transfer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from circuitlens.adapt.options import TrainingOptions
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.models.batch import Readout
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Encoded, Task

__all__ = ["Choice", "KVPolicy"]

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
        data: pool B of the target, for strategies that look at it.
        source: the source task, for strategies that look at its pool A.
        training: for strategies that train to find out what is to be trained.
        checkpoints: folder of the states of such trainings.
    """

    circuit: Circuit
    scores: HeadScores | None = None
    seed: int = 0
    kv_policy: KVPolicy = "shared"
    readout: Readout | None = None
    data: Encoded | None = None
    source: Task | None = None
    training: TrainingOptions | None = None
    checkpoints: Path | None = None

    @property
    def ranked(self) -> HeadScores:
        """The scores.

        Raises:
            InputError: if there are none.
        """
        if self.scores is None:
            raise InputError("This strategy chooses by the heads' scores: pass scores=….")
        return self.scores

    @property
    def target(self) -> Encoded:
        """Pool B of the target.

        Raises:
            InputError: if there is none.
        """
        if self.data is None:
            raise InputError("This strategy looks at the target's training data: give some.")
        return self.data

    @property
    def known(self) -> Task:
        """The source task.

        Raises:
            InputError: if there is none.
        """
        if self.source is None:
            raise InputError("This strategy looks at the source's data: pass source=….")
        return self.source

    def old(self, model: HookedModel) -> Encoded:
        """Pool A of the source, encoded.

        Raises:
            InputError: if there is no source task.
        """
        return self.known.encode(model, self.known["pool_a"])
