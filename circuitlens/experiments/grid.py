"""Strategies × languages × seeds: a transfer for every cell, each written as soon as it is done.

1. Settings are checked, and with a folder compared with those of the cells that are there.
2. Every cell that is not finished is run, here or by an executor; one that fails is recorded, and
   the rest continues.
3. The cells that were asked for are returned; the folder gets tables of all its cells.

Cells are written where they are run, each behind a lock. The index of the folder is written by the
call itself only.
"""

from __future__ import annotations

import logging
import multiprocessing
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import torch

from circuitlens.adapt.options import (
    DEFAULT_STRATEGIES,
    TRANSFER,
    TrainingKeywords,
    TrainingOptions,
    check_keep_source,
    replays_of,
    training_tries,
    trains,
)
from circuitlens.adapt.retention import retained_tasks
from circuitlens.adapt.strategies import AUTO, KVPolicy, strategy_of
from circuitlens.adapt.transfers import (
    check_circuit,
    check_kv_policy,
    check_scores,
)
from circuitlens.circuit import Circuit
from circuitlens.errors import CIRCUIT, MODEL, TASK, InputError, check_types
from circuitlens.experiments.cell_folder import CellFolder, Key
from circuitlens.experiments.cells import CellSpec, ModelReference, run_cell
from circuitlens.experiments.comparison import Comparison
from circuitlens.experiments.on_ray import RayCluster
from circuitlens.experiments.simple_rivals import SIMPLE, simple_cell, simple_rival
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Evaluation, Task
from circuitlens.utils.processes import agreed, is_main, n_processes
from circuitlens.utils.progress import progress
from circuitlens.utils.storage import digest

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["Runner", "check_executor", "compare", "for_others", "run_by", "runner_of"]

logger = logging.getLogger(__name__)

R = TypeVar("R")
Runner = Executor | RayCluster

_FATAL = (torch.OutOfMemoryError, torch.AcceleratorError)


@trains(TRANSFER, but=("learning_rate", "seed"))
def compare(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    languages: Sequence[str],
    *,
    strategies: Sequence[str | PeftConfig] | None = None,
    seeds: Iterable[int] = (0, 1, 2),
    scores: HeadScores | None = None,
    out: str | Path | None = None,
    retain: Sequence[Task | str] = (),
    learning_rates: Iterable[float] | None = None,
    training: TrainingOptions | None = None,
    replay: float | Sequence[float] = 0.0,
    keep_source: float | None = None,
    kv_policy: KVPolicy = "shared",
    test_front: bool = False,
    executor: Runner | Literal["processes", "ray"] | None = None,
    simple: bool = True,
    quiet: bool = False,
    **options: Unpack[TrainingKeywords],
) -> Comparison:
    """Adapt a model by several strategies, to several languages, with several seeds.

    With ``out``, an interrupted comparison resumes when it is called again, and a finished one can
    grow by languages, strategies and seeds. Cells that failed are tried again. Several calls may
    work on one folder at the same time: each cell is run by one of them.

    Args:
        model: the proxy, competent in the source language; left as it is.
        circuit: the heads to train; other strategies take its size.
        task: the task in the source language.
        languages: target languages.
        strategies: names of :data:`circuitlens.adapt.STRATEGIES`, configurations of PEFT,
            ``"peft:config.json"``, or ``"auto"``. The default is circuit, near-zero (if there are
            ``scores``), random, norms, lora and full.
        seeds: each makes a separate transfer: order of the examples, heads drawn at random.
        scores: of all heads, for strategies that choose by them.
        out: folder for the numbers of every cell and the tables of all of them; the adapted
            models are not kept. Without it everything is in memory.
        retain: other tasks, or other languages of this one, on which retention is measured.
        learning_rates, training, replay, keep_source, kv_policy, test_front: see
            :func:`circuitlens.transfer`.
        executor: runs the cells. ``"processes"`` uses the CPU cores of this machine, ``"ray"`` or
            a :class:`circuitlens.experiments.RayCluster` those and the GPUs of a cluster; or a
            ``concurrent.futures.Executor`` of your own that spawns processes. Each process loads
            the model once. By default cells are run here, one by one.
        simple: add the most frequent label and n-grams with logistic regression as rivals, fitted
            on the same rows (:func:`circuitlens.experiments.simple_rival`).
        quiet: no progress bar.
        options: fields of :class:`circuitlens.adapt.options.TrainingOptions`, which replace those
            of ``training``.

    Returns:
        The cells that were asked for, whatever else the folder holds.

    Raises:
        InputError: for settings that no cell could work with, or other ones than those of the
            cells in ``out``; the message names the setting.
        torch.OutOfMemoryError, torch.AcceleratorError: if a device fails, after which other cells
            would fail too. What was finished is in ``out``.
    """
    check_types(
        "compare",
        model=(model, HookedModel, MODEL),
        circuit=(circuit, Circuit, CIRCUIT),
        task=(task, Task, TASK),
    )
    check_executor(executor, model.device)
    if strategies is None:
        strategies = _usual_strategies(scores)
    for name, values in (("languages", languages), ("strategies", strategies), ("seeds", seeds)):
        if isinstance(values, str | int):
            raise InputError(f"{name} is a list: give [{values!r}].")
    seeds = [*map(operator.index, seeds)]
    for name, values in (("language", languages), ("strategy", strategies), ("seed", seeds)):
        if not values:
            raise InputError(f"Give at least one {name}.")
    # A mistake found later would be in the folder's settings.
    if "seed" in options:
        raise InputError("A comparison has several seeds: give seeds=[…], not seed.")
    tries = training_tries(learning_rates, training, options)
    for seed in seeds:
        tries[0].updated({"seed": seed})
    rates = [option.learning_rate for option in tries]
    mixes = replays_of(replay)
    check_keep_source(keep_source)
    check_kv_policy(kv_policy)
    check_scores(model, scores)
    _check_strategies(strategies, scores)
    check_circuit(model, circuit)
    others = retained_tasks(task, task, retain)[1:]
    # Encoding one example checks the tokenizer and the label words.
    task.encode(model, task["validation"][:1])
    tasks = {target.language: target for target in map(task.to, languages)}
    # A strategy of PEFT is told from others by its name, which its content gives.
    named = {name if name == AUTO else strategy_of(name).name: name for name in strategies}
    keys = [
        Key(language, strategy, seed)
        for language in tasks
        for strategy in named
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
            "replay": mixes[0] if len(mixes) == 1 else list(mixes),
            "kv_policy": kv_policy,
        }
        if keep_source is not None:
            settings["keep_source"] = keep_source
        if test_front:
            settings["test_front"] = True
        fingerprints = {name: target.fingerprint() for name, target in tasks.items()}
        folder = CellFolder.open(Path(out), settings, fingerprints, writes=is_main(model.device))

    finished: dict[Key, dict[str, Any]] = {}
    if folder is not None:
        finished = {key: cell for key in keys if (cell := folder.read(key)) is not None}
        if finished:
            logger.info("%d of %d cells were already finished.", len(finished), len(keys))
    cells = dict(agreed(finished, model.device))
    todo = [key for key in keys if key not in cells]
    alone = executor is None or not todo
    with (
        runner_of(None if alone else executor) as by,
        for_others(model, None if folder is None else folder.path, alone=alone) as given,
    ):
        specs = [
            CellSpec(
                key,
                given,
                circuit,
                tasks[key.language],
                scores,
                tuple(others),
                tuple(rates),
                tries[0],
                mixes,
                keep_source,
                kv_policy,
                test_front=test_front,
                folder=None if folder is None else folder.path,
                strategy=named[key.strategy],
            )
            for key in todo
        ]
        errors = []
        runs = _run_here(specs) if by is None else run_by(by, run_cell, specs)
        for key, found in progress(runs, "Comparing", quiet=quiet, total=len(todo)):
            if not isinstance(found, Exception):
                cells[key] = found
                if folder is not None and isinstance(by, RayCluster):
                    # Its workers may see no file of this machine.
                    folder.write(key, found)
                continue
            kind = type(found).__name__
            errors.append({**key._asdict(), "type": kind, "message": str(found)})
            logger.warning("%s failed: %s: %s", key, kind, found)
            logger.debug("Where it failed:", exc_info=found)
            if folder is not None and is_main(model.device):
                folder.fail(key, errors[-1])
            if isinstance(found, _FATAL):
                # After these nothing works on this device any more.
                raise found
    if simple:
        beside = _simple_cells(model, tasks, [*dict.fromkeys(seeds)], cells, folder)
        cells |= beside
        keys += beside
    if folder is not None and is_main(model.device):
        folder.comparison().save(folder.path)
    return Comparison(tuple(cells[key] for key in keys if key in cells), tuple(errors))


def _simple_cells(
    model: HookedModel,
    tasks: Mapping[str, Task],
    seeds: Sequence[int],
    cells: Mapping[Key, Mapping[str, Any]],
    folder: CellFolder | None,
) -> dict[Key, dict[str, Any]]:
    """Cells of the simple rivals, fitted once per language; they do not depend on seeds."""
    found: dict[Key, dict[str, Any]] = {}
    for language, task in tasks.items():
        before = next(
            (c["target_before"] for key, c in cells.items() if key.language == language), None
        )
        if before is None:
            # Every strategy failed, and so has the model nothing to compare with.
            continue
        for name in SIMPLE:
            wanted = [Key(language, name, seed) for seed in seeds]
            kept = {key: folder.read(key) for key in wanted} if folder is not None else {}
            known = next((cell for cell in kept.values() if cell is not None), None)
            if known is None:
                rival = simple_rival(task, name)
                known = simple_cell(rival, task, Evaluation(**before), seeds[0])
            for key in wanted:
                found[key] = {**known, "seed": key.seed}
                if folder is not None and kept[key] is None and is_main(model.device):
                    folder.write(key, found[key])
    return found


def _run_here(specs: Sequence[CellSpec]) -> Iterator[tuple[Key, dict[str, Any] | Exception]]:
    for spec in specs:
        # An interrupt is no Exception, so it ends the loop and is not recorded.
        try:
            yield spec.key, run_cell(spec)
        except Exception as error:
            yield spec.key, error


def run_by(
    runner: Runner, work: Callable[[CellSpec], R], specs: Sequence[CellSpec]
) -> Iterator[tuple[Key, R | Exception]]:
    """Yield what ``work`` makes of each cell elsewhere, or why it failed, as they are finished."""
    if isinstance(runner, RayCluster):
        yield from runner.run(work, specs)
        return
    futures = {runner.submit(work, spec): spec.key for spec in specs}
    try:
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                raise error
            # An interrupt of a process is one of the call.
            if error is not None and not isinstance(error, Exception):
                raise error
            yield futures[future], error or future.result()
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def for_others(
    model: HookedModel, folder: Path | None, *, alone: bool
) -> Iterator[HookedModel | ModelReference]:
    """The model as this process gets it, if it is alone, or as others do, from a file."""
    if alone:
        yield model
        return
    with TemporaryDirectory(prefix=".model-", dir=folder) as where:
        yield ModelReference.save(model, Path(where))


@contextmanager
def runner_of(executor: Runner | str | None) -> Iterator[Runner | None]:
    """What runs cells, by its name or as it was given."""
    if executor == "ray":
        yield RayCluster()
    elif executor == "processes":
        spawn = multiprocessing.get_context("spawn")
        # Two processes that compute with two threads each would wait for each other.
        with ProcessPoolExecutor(
            os.cpu_count(), mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    else:
        assert not isinstance(executor, str)
        yield executor


def check_executor(executor: object, device: torch.device) -> None:
    """Reject what cannot run cells.

    Raises:
        InputError: saying what can.
    """
    if executor is None:
        return
    if isinstance(executor, ThreadPoolExecutor):
        raise InputError(
            "Hooks on a model are not safe in threads: give an executor of processes, such as "
            "ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('spawn'))."
        )
    known = executor in ("processes", "ray") or isinstance(executor, RayCluster)
    if not known and not callable(getattr(executor, "submit", None)):
        what = repr(executor) if isinstance(executor, str) else f"a {type(executor).__name__}"
        raise InputError(
            "executor is 'processes', 'ray', a RayCluster or a concurrent.futures.Executor, but "
            f"got {what}."
        )
    if n_processes(device) > 1:
        raise InputError(
            "Processes of accelerate launch share the work of every cell already: leave executor "
            "out, or start Python without accelerate."
        )


def _settings(training: TrainingOptions) -> dict[str, Any]:
    """What all cells have in common of their training."""
    return {k: v for k, v in training.to_dict().items() if k not in ("learning_rate", "seed")}


def _usual_strategies(scores: HeadScores | None) -> list[str]:
    """The usual strategies, without those that need scores where there are none."""
    able = [name for name in DEFAULT_STRATEGIES if scores is not None or not _needs_scores(name)]
    if left := [name for name in DEFAULT_STRATEGIES if name not in able]:
        logger.info("Without scores=… the comparison leaves out %s.", ", ".join(left))
    return able


def _needs_scores(name: Any) -> bool:
    # What decides between circuit and near-zero needs what near-zero needs.
    return strategy_of("near-zero" if name == AUTO else name).by_scores


def _check_strategies(strategies: Sequence[Any], scores: HeadScores | None) -> None:
    for name in strategies:
        if _needs_scores(name) and scores is None:
            raise InputError(
                f"The strategy {name!r} chooses by the heads' scores: pass scores=…, or leave it "
                "out."
            )
