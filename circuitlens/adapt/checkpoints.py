"""The folder of one training: what it is a training of, its last epochs, its result.

DIR/training.json                     settings, and digests of the data, of all first weights and of
                                      what is trained of them
DIR/checkpoint-STEP/                  as the Trainer writes it, with the trained weights only
DIR/checkpoint-STEP/best.safetensors  the best weights so far; written last, so that a checkpoint
                                      that has it is whole
DIR/finished.safetensors              the weights and the log of a finished training
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from circuitlens.adapt.monitors import Watch
from circuitlens.adapt.options import TrainingLog, TrainingOptions
from circuitlens.adapt.trainable import Trainable
from circuitlens.adapt.trainer import put, trained
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import count_backward, count_forward
from circuitlens.tasks import Encoded
from circuitlens.utils.storage import digest, read_json, read_tensors, write_json, write_tensors

__all__ = ["Checkpoints"]

_TRAINING = "circuitlens.training/1"
_FINISHED = "circuitlens.training-finished/1"


class Checkpoints:
    """What is on disk of a training that is about to start or to continue.

    Args:
        folder: created if necessary.
        model: as it is before the training.
        data: to train on.
        validation: chooses the epoch.
        options: how to train.
        trainable: what is trained; all weights if there is none.
        watches: monitors, which may choose the epoch.

    Raises:
        InputError: if the folder holds another training, naming what differs.
    """

    def __init__(
        self,
        folder: Path,
        model: HookedModel,
        data: Encoded,
        validation: Encoded | None,
        options: TrainingOptions,
        trainable: Trainable | None = None,
        watches: Sequence[Watch] = (),
    ) -> None:
        self.folder = folder
        self.parameters = trained(model.hf)
        file = folder / "training.json"
        mine = {
            **options.to_dict(),
            "data": _content(data),
            "validation": None if validation is None else _content(validation),
            "first weights": model.fingerprint(),
            "trained": _selection(trainable),
        }
        if watches:
            # Of a function there is only the name to go by.
            mine["monitors"] = [[w.name, w.keep, w.identity] for w in watches]
        if not file.is_file():
            write_json(file, _TRAINING, mine, sealed=True)
            return
        stored = read_json(file, _TRAINING)
        for name, value in ({"monitors": None} | mine).items():
            if stored.get(name) != value:
                raise InputError(
                    f"{folder} contains checkpoints of another training ({name} was "
                    f"{stored.get(name)!r}, now {value!r}): choose another folder for checkpoints, "
                    "or remove that one."
                )

    def finished(self) -> TrainingLog | None:
        """Put the result of a finished training into the model and return its log."""
        file = self.folder / "finished.safetensors"
        if not file.is_file():
            return None
        weights, log = read_tensors(file, _FINISHED)
        put(self.parameters, weights)
        count_forward(log.get("forward", 0.0))
        count_backward(log.get("backward", 0.0))
        return TrainingLog(**{**log, "history": tuple(log["history"])})

    def last(self) -> Path | None:
        """The newest checkpoint that was written to the end."""
        return max(self._complete(), key=_step, default=None)

    def _complete(self) -> Sequence[Path]:
        return [path.parent for path in self.folder.glob("checkpoint-*/best.safetensors")]

    def finish(self, log: TrainingLog) -> None:
        """Write the result; the checkpoints are no longer needed."""
        file = self.folder / "finished.safetensors"
        write_tensors(file, _FINISHED, self.parameters, asdict(log))
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def _content(data: Encoded) -> str:
    sounds = (part for features in data.features for part in features)
    return digest(repr((data.ids, data.tokens, data.gold, data.readout)), *sounds)


def _selection(trainable: Trainable | None) -> str:
    if trainable is None:
        return "all weights"
    if trainable.masks is not None:
        return digest(*trainable.masks, *trainable.masks.values())
    # The heads of an adapter are only in its configuration: its weights begin at zero.
    configs = {name: c.to_dict() for name, c in trainable.adapter.peft_config.items()}
    return digest(json.dumps(configs, sort_keys=True, default=_plain))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
