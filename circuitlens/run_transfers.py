"""The transfers of a run, side by side: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from circuitlens.adapt import TransferResult
from circuitlens.circuit import Circuit
from circuitlens.experiments.cell_folder import Key
from circuitlens.experiments.cells import CellSpec, saved_cell
from circuitlens.experiments.grid import Runner, check_executor, for_others, run_by, runner_of
from circuitlens.models.hooked import HookedModel
from circuitlens.run_settings import RunSettings
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Task
from circuitlens.utils.progress import progress
from circuitlens.utils.storage import replacing

__all__ = ["transfers_by"]

logger = logging.getLogger(__name__)


def transfers_by(
    executor: Runner | str,
    model: HookedModel,
    circuit: Circuit,
    scores: HeadScores,
    todo: Sequence[tuple[Task, str]],
    settings: RunSettings,
    path_of: Callable[[str, str], Path],
    *,
    quiet: bool = False,
) -> None:
    """Run transfers and write each as it is finished.

    Args:
        executor: as of :func:`circuitlens.compare`.
        model, circuit, scores: of the run.
        todo: tasks in their target languages, and strategies.
        settings: of the run.
        path_of: folder of the result of a language and strategy.
        quiet: no progress bar.

    Raises:
        Exception: the first failure of a transfer, once the others are finished.
    """
    check_executor(executor, model.device)
    common: dict[str, Any] = dict(settings.transferring)
    with runner_of(executor) as runner, for_others(model, None, alone=False) as given:
        assert runner is not None
        specs = [
            CellSpec(
                Key(task.language, strategy, settings.seed),
                given,
                circuit,
                task,
                scores,
                rediscover=settings.rediscover,
                **{**common, "retain": tuple(task.to(name) for name in settings.retain)},
            )
            for task, strategy in todo
        ]
        failures: list[Exception] = []
        runs = run_by(runner, saved_cell, specs)
        for key, found in progress(runs, "Transfers", quiet=quiet, total=len(specs)):
            if isinstance(found, Exception):
                logger.warning("Transfer to %s (%s) failed: %s", key.language, key.strategy, found)
                failures.append(found)
            else:
                path = path_of(key.language, key.strategy)
                _write(path, found)
                result = TransferResult.load(path)
                logger.info(
                    "%s: %s test accuracy %.3f -> %.3f at rate %g.",
                    key.strategy,
                    key.language,
                    result.target_before.accuracy,
                    result.target_after.accuracy,
                    result.learning_rate,
                )
    if failures:
        raise failures[0]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    # Written last, so that a folder with a result is a whole one.
    for name in sorted(files, key=lambda name: name == "result.json"):
        with replacing(folder / name) as temporary:
            temporary.write_bytes(files[name])
