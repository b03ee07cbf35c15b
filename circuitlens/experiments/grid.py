"""Strategies × languages × seeds: a transfer for every cell, each written as soon as it is done.

1. Settings are checked, and with a folder compared with those of the cells that are there.
2. Every cell that is not finished is computed; one that fails is recorded, and the rest goes on.
3. The cells that were asked for are returned; the folder gets tables of all its cells.
"""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

from circuitlens.adapt.options import (
    TRANSFER,
    TrainingKeywords,
    TrainingOptions,
    check_replay,
    training_tries,
    trains,
)
from circuitlens.adapt.retention import retained_tasks
from circuitlens.adapt.strategies import AUTO, Choice, KVPolicy, strategy_of
from circuitlens.adapt.transfers import (
    check_circuit,
    check_kv_policy,
    check_scores,
    transfer,
)
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.experiments.cell_folder import CellFolder, Key
from circuitlens.experiments.comparison import Comparison
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Task
from circuitlens.utils.peak_memory import PeakMemory
from circuitlens.utils.progress import progress
from circuitlens.utils.storage import digest

__all__ = ["compare"]

logger = logging.getLogger(__name__)


@trains(TRANSFER, but=("learning_rate", "seed"))
def compare(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    languages: Sequence[str],
    *,
    strategies: Sequence[str] = ("circuit", "near-zero", "random", "norms", "lora", "full"),
    seeds: Iterable[int] = (0, 1, 2),
    scores: HeadScores | None = None,
    out: str | Path | None = None,
    retain: Sequence[Task | str] = (),
    learning_rates: Iterable[float] | None = None,
    training: TrainingOptions | None = None,
    replay: float = 0.0,
    kv_policy: KVPolicy = "shared",
    quiet: bool = False,
    **options: Unpack[TrainingKeywords],
) -> Comparison:
    """Adapt a model by several strategies, to several languages, with several seeds.

    With ``out``, an interrupted comparison goes on where it stopped when it is called again, and
    a finished one can grow by languages, strategies and seeds. Cells that failed are tried again.

    Args:
        model: the proxy, competent in the source language; left as it is.
        circuit: the heads to train; other strategies take its size.
        task: the task in the source language.
        languages: target languages.
        strategies: names of :data:`circuitlens.adapt.STRATEGIES`, or ``"auto"``.
        seeds: each makes a transfer of its own: order of the examples, heads drawn at random.
        scores: of all heads, for strategies that choose by them.
        out: folder for the numbers of every cell and the tables of all of them; the adapted
            models are not kept. Without it everything is in memory.
        retain: further tasks, or languages of this one, on which retention is measured.
        learning_rates, training, replay, kv_policy: see :func:`circuitlens.transfer`.
        quiet: no progress bar.
        options: fields of :class:`circuitlens.adapt.options.TrainingOptions`, which replace those
            of ``training``.

    Returns:
        The cells that were asked for, whatever else the folder holds.

    Raises:
        InputError: for settings that no cell could work with, or other ones than those of the
            cells in ``out``; the message names the setting.
    """
    for name, values in (("languages", languages), ("strategies", strategies), ("seeds", seeds)):
        if isinstance(values, str | int):
            raise InputError(f"{name} is a list: give [{values!r}].")
    seeds = [*map(operator.index, seeds)]
    for name, values in (("language", languages), ("strategy", strategies), ("seed", seeds)):
        if not values:
            raise InputError(f"Give at least one {name}.")
    # A mistake found later would stand in the folder's settings.
    if "seed" in options:
        raise InputError("A comparison has several seeds: give seeds=[…], not seed.")
    tries = training_tries(learning_rates, training, options)
    for seed in seeds:
        tries[0].updated({"seed": seed})
    rates = [option.learning_rate for option in tries]
    check_replay(replay)
    check_kv_policy(kv_policy)
    check_scores(model, scores)
    _check_strategies(strategies, circuit, scores)
    check_circuit(model, circuit)
    others = retained_tasks(task, task, retain)[1:]
    # Encoding one example checks the tokenizer and the label words.
    task.encode(model, task["validation"][:1])
    tasks = {target.language: target for target in map(task.to, languages)}
    keys = [
        Key(language, strategy, seed)
        for language in tasks
        for strategy in dict.fromkeys(strategies)
        for seed in dict.fromkeys(seeds)
    ]
    folder = None
    if out is not None:
        settings = {
            "model": model.fingerprint(),
            "circuit": [str(head) for head in circuit],
            "scores": None if scores is None else digest(scores.per_example),
            "task": f"{task.full_name} {task.fingerprint()}",
            "retain": [f"{other.full_name} {other.fingerprint()}" for other in others],
            "learning_rates": rates,
            **_settings(tries[0]),
            "replay": replay,
            "kv_policy": kv_policy,
        }
        fingerprints = {name: target.fingerprint() for name, target in tasks.items()}
        folder = CellFolder.open(Path(out), settings, fingerprints)

    def compute(key: Key) -> dict[str, Any]:
        with PeakMemory(model.device) as memory:
            result = transfer(
                model,
                circuit,
                tasks[key.language],
                strategy=key.strategy,
                scores=scores,
                retain=others,
                replay=replay,
                kv_policy=kv_policy,
                learning_rates=rates,
                training=tries[0],
                checkpoints=None if folder is None else folder.checkpoints(key),
                seed=key.seed,
                quiet=True,
            )
        cell = {**result.to_dict(), "seed": key.seed, "peak_mib": memory.mib}
        # What a file gives back; numbers that are not finite fail here, with or without a file.
        return dict(json.loads(json.dumps(cell, allow_nan=False)))

    cells: dict[Key, dict[str, Any]] = {}
    if folder is not None:
        cells = {key: cell for key in keys if (cell := folder.read(key)) is not None}
        if cells:
            logger.info("%d of %d cells were finished already.", len(cells), len(keys))
    errors = []
    todo = [key for key in keys if key not in cells]
    for key in progress(todo, "Comparing", quiet=quiet):
        # An interrupt is no Exception, so it ends the loop and is not recorded.
        try:
            cells[key] = compute(key)
        except Exception as error:
            errors.append({**key._asdict(), "type": type(error).__name__, "message": str(error)})
            logger.warning("%s failed: %s: %s", key, type(error).__name__, error)
            logger.debug("Where it failed:", exc_info=True)
            if folder is not None:
                folder.fail(key, errors[-1])
        else:
            if folder is not None:
                folder.write(key, cells[key])
    if folder is not None:
        folder.comparison().save(folder.path)
    return Comparison(tuple(cells[key] for key in keys if key in cells), tuple(errors))


def _settings(training: TrainingOptions) -> dict[str, Any]:
    """What all cells have in common of their training."""
    return {k: v for k, v in training.to_dict().items() if k not in ("learning_rate", "seed")}


def _check_strategies(
    strategies: Sequence[str], circuit: Circuit, scores: HeadScores | None
) -> None:
    for name in strategies:
        # What decides between circuit and near-zero needs what near-zero needs.
        how = strategy_of("near-zero" if name == AUTO else name)
        if scores is None:
            try:
                how.choose(Choice(circuit))
            except InputError as error:
                raise InputError(
                    f"The strategy {name!r} chooses by the heads' scores: pass scores=…, or leave "
                    "it out."
                ) from error
