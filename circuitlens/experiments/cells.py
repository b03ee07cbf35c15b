"""A cell of a grid: one transfer, as a specification that travels to another process.

A specification names its model by a folder and a fingerprint, so that it is small; the process that
runs the cell loads the model once and checks that it is the one that was meant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from circuitlens.adapt.options import TrainingOptions
from circuitlens.adapt.strategies import AUTO, KVPolicy, strategy_of
from circuitlens.adapt.transfers import transfer
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.experiments.cell_folder import CellFolder, Key
from circuitlens.models.hooked import HookedModel
from circuitlens.opening import load
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Task
from circuitlens.utils.peak_memory import PeakMemory
from circuitlens.utils.processes import is_main, n_processes

__all__ = ["CellSpec", "ModelReference", "run_cell", "saved_cell"]


@dataclass(frozen=True)
class ModelReference:
    """A model in a folder.

    Attributes:
        folder: written by :meth:`HookedModel.save`.
        fingerprint: of the model.
        name, origin: as the model's own; results name them.
        dtype, device: where it is to be loaded.
    """

    folder: str
    fingerprint: str
    name: str
    origin: str
    dtype: str
    device: str

    @classmethod
    def save(cls, model: HookedModel, folder: Path) -> ModelReference:
        """Write a model for other processes."""
        model.save(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(
            str(folder.resolve()),
            model.fingerprint(),
            model.name,
            model.origin,
            dtype,
            str(model.device),
        )

    def open(self) -> HookedModel:
        """Load the model; one is kept for the next cell.

        Raises:
            InputError: if the folder holds another model.
        """
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(reference: ModelReference) -> HookedModel:
    model = load(reference.folder, dtype=reference.dtype, device=reference.device)
    model.name, model.origin = reference.name, reference.origin
    if model.fingerprint() != reference.fingerprint:
        raise InputError(
            f"The copy of {reference.name} in {reference.folder} is another model (fingerprint "
            f"{model.fingerprint()}, not {reference.fingerprint}): compare without an executor."
        )
    return model


@dataclass(frozen=True)
class CellSpec:
    """All that one transfer of a grid needs.

    Attributes:
        key: language, strategy and seed.
        model: the proxy, or a reference to it for another process.
        strategy: what to train, if it is more than the name in the key: a configuration of PEFT.
        circuit, task, scores, retain, replay, keep_source, kv_policy, rediscover, test_front,
            learning_rates, training: see :func:`circuitlens.transfer`.
        folder: where the cell is written; without one it is only returned.
    """

    key: Key
    model: HookedModel | ModelReference
    circuit: Circuit
    task: Task
    scores: HeadScores | None
    retain: tuple[Task, ...]
    learning_rates: tuple[float, ...]
    training: TrainingOptions
    replay: float | tuple[float, ...] = 0.0
    keep_source: float | None = None
    kv_policy: KVPolicy = "shared"
    rediscover: bool = False
    test_front: bool = False
    folder: Path | None = None
    strategy: Any = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of the transfer; a model that is in a folder is opened."""
        about = ("circuit", "task", "scores", "retain", "rediscover")
        names = (*about, "replay", "keep_source", "kv_policy", "test_front")
        return {
            "model": self.model.open() if isinstance(self.model, ModelReference) else self.model,
            **{name: getattr(self, name) for name in names},
            "strategy": self.key.strategy if self.strategy is None else self.strategy,
            "learning_rates": self.learning_rates,
            "training": self.training.updated({"seed": self.key.seed}),
            "quiet": True,
        }


def run_cell(spec: CellSpec) -> dict[str, Any]:
    """Run a cell and return its numbers; one that another process has finished is read.

    Processes that train together (``accelerate launch``) all run the cell, and the main one writes
    it: if one of them read it instead, the others would wait for it forever.

    Raises:
        InputError: for arguments that a transfer rejects, or a model other than the one meant.
        NotFiniteError: if training diverges at every learning rate.
    """
    folder = None if spec.folder is None else CellFolder(spec.folder)
    if folder is None:
        return _measure(spec, None)
    device = torch.device(spec.model.device)
    if n_processes(device) > 1:
        found = _measure(spec, folder)
        if is_main(device):
            folder.write(spec.key, found)
        return found
    with folder.lock(spec.key):
        if (cell := folder.read(spec.key)) is not None:
            return cell
        found = _measure(spec, folder)
        folder.write(spec.key, found)
        return found


def _measure(spec: CellSpec, folder: CellFolder | None) -> dict[str, Any]:
    given = spec.arguments()
    checkpoints = None if folder is None else folder.checkpoints(spec.key)
    with PeakMemory(given["model"].device) as memory:
        result = transfer(**given, checkpoints=checkpoints)
    cell = {**result.to_dict(), "seed": spec.key.seed, "peak_mib": memory.mib}
    # As transfer does, which asks of auto what it asks of circuit.
    how = strategy_of("circuit" if spec.key.strategy == AUTO else given["strategy"])
    if how.by_circuit or how.by_scores:
        cell["discovery_passes"] = spec.scores.passes if spec.scores else None
    # What a file gives back; numbers that are not finite fail here, with or without a file.
    return dict(json.loads(json.dumps(cell, allow_nan=False)))


def saved_cell(spec: CellSpec) -> dict[str, bytes]:
    """Run a transfer and return the files that it is saved as, trained tensors among them."""
    result = transfer(**spec.arguments())
    with TemporaryDirectory() as scratch:
        result.save(scratch)
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
