"""A run in a folder: every stage writes its result there once it is whole, and is never redone.

    DIR/run.json                       settings, versions, fingerprints, all numbers
    DIR/proxy/                         the competent model, if the competence stage trained one
    DIR/baseline.safetensors           means of the heads
    DIR/scores.safetensors             relevance of the heads
    DIR/circuit.json                   the circuit
    DIR/effects.safetensors            what ablating each of its heads does
    DIR/roles.json                     what they look at, and which labels they raise
    DIR/lens.safetensors               the task margin after every layer
    DIR/faithfulness.safetensors       its faithfulness
    DIR/transfers/LANGUAGE/STRATEGY/   result.json and the trained weights of a transfer
    DIR/compare/                       strategies × languages × seeds (circuitlens compare)
    DIR/report.html                    all of it, to look at
    DIR/replaced-N/                    results of an earlier circuit (circuitlens discover --redo)

A stage whose files are there is loaded, not computed, so an interrupted run resumes there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from circuitlens.adapt import TransferResult, finetune, is_competent, transfer
from circuitlens.adapt.result import saved_transfers
from circuitlens.baseline import MeanBaseline, label_balanced_mean
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.effects import HeadEffects, head_effects
from circuitlens.circuits.lens import MarginByLayer, margin_by_layer
from circuitlens.circuits.looking import HeadRoles, head_roles
from circuitlens.circuits.measure_faithfulness import default_sizes, faithfulness
from circuitlens.circuits.smallest import smallest_circuit
from circuitlens.errors import InputError
from circuitlens.experiments.grid import Runner
from circuitlens.models.hooked import HookedModel
from circuitlens.models.loading import find_device
from circuitlens.opening import load
from circuitlens.planning import Plan, check_memory, plan_run
from circuitlens.run_exchange import complete_exchange, exchange
from circuitlens.run_output import Found, log_checks, record_of, report_of
from circuitlens.run_settings import (
    SCORING,
    RunSettings,
    check_run,
    folder_of,
    refuse_other_run,
    share_kept,
)
from circuitlens.run_transfers import transfers_by
from circuitlens.scoring.head_scores import HeadScores, head_count
from circuitlens.scoring.score_heads import relevance
from circuitlens.settings_files import settings_file
from circuitlens.tasks import Task
from circuitlens.utils.progress import RunClock, interactive
from circuitlens.utils.shared_files import SharedFiles
from circuitlens.utils.storage import RUN_SCHEMA, read_json, safe_name, write_json
from circuitlens.utils.threads import settle_threads

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)


class RunFolder:
    """A run and its folder. Attributes are computed, or loaded, when first asked for."""

    def __init__(
        self, path: Path, settings: RunSettings, begun_in: str | None = None, *, quiet: bool = False
    ) -> None:
        self.path = path
        # As they were given; paths among them are relative to the folder the run was begun in.
        self._given = settings
        self._begun_in = begun_in or os.path.relpath(Path.cwd(), path.resolve())
        base = Path(os.path.normpath(path.resolve() / self._begun_in))
        self.settings = settings if base == Path.cwd() else settings.seen_from(base)
        self.quiet = quiet
        self._clock = RunClock()
        self._shared = SharedFiles(find_device(settings.device) or torch.device("cpu"))

    # -- opening ---------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, settings: RunSettings, *, quiet: bool = False) -> RunFolder:
        """Begin a run in a new folder, or resume an unfinished one of the same settings.

        Raises:
            InputError: if the folder holds anything else, or a finished run.
        """
        path = Path(path)
        complete_exchange(path)
        run = cls(path, settings, quiet=quiet)
        if run._shared.agreed(not path.exists() or not any(path.iterdir())):
            # Before the folder is made, so that a mistake in an argument leaves nothing behind.
            run.check()
            run.write_record()
            run._write_settings()
            return run
        if not (path / "run.json").is_file():
            raise InputError(
                f"The output folder {path} exists, is not empty and contains no circuitlens run: "
                "choose another --out."
            )
        refuse_other_run(path, read_json(path / "run.json", RUN_SCHEMA), settings)
        logger.info("Resuming the unfinished run in %s.", path)
        run.check()
        run._write_settings()
        return run

    def _write_settings(self) -> None:
        content = settings_file(self._given)
        self._shared.write(self.path / "run.yaml", lambda f: f.write_text(content, "utf-8"))

    @classmethod
    def open(cls, path: str | Path, *, quiet: bool = False) -> RunFolder:
        """Open the folder of an earlier run.

        Raises:
            InputError: if there is no run in it.
        """
        path = Path(path)
        check_run(path)
        complete_exchange(path)
        record = read_json(path / "run.json", RUN_SCHEMA)
        given = RunSettings.from_dict(record["settings"])
        return cls(path, given, record.get("begun_in"), quiet=quiet)

    def check(self) -> None:
        """Find mistakes in the settings before any work is done."""
        for target in self.settings.targets:
            self.task.to(target)
        size = self.settings.size
        if not isinstance(size, str) and not head_count(size, len(self._start.geometry)):
            raise InputError("The circuit would have no heads: give a larger size.")
        # Encoding one example checks the tokenizer and the label words.
        self.task.encode(self._start, self.task["validation"][:1])
        strategies = self.settings.strategies if self.settings.targets else ()
        check_memory(self._start, strategies, finetunes=self.settings.competence == "always")

    def plan(self) -> Plan:
        """Say what the run takes from its beginning."""
        self.check()
        return plan_run(self._start, self.task, self.settings)

    # -- stages ----------------------------------------------------------------------------

    @cached_property
    def task(self) -> Task:
        """The task in the source language."""
        return self.settings.open_task()

    @cached_property
    def _start(self) -> HookedModel:
        model = self.settings.open_model(self.task)
        settle_threads(model.hf)
        return model

    @cached_property
    def model(self) -> HookedModel:
        """The competent model: the proxy of the folder, trained if need be."""
        proxy = self.path / "proxy"
        if self._shared.there(proxy):
            trained = load(proxy, device=self.settings.device)
            settle_threads(trained.hf)
            return trained
        mode = self.settings.competence
        if mode == "never":
            return self._start
        competent, accuracy = is_competent(self._start, self.task)
        if mode == "auto" and competent:
            logger.info("Competence: validation accuracy is already %.3f.", accuracy)
            return self._start
        logger.info("Competence: validation accuracy is %.3f, so fine-tuning begins.", accuracy)
        with self._clock.stage("competence"):
            trained = finetune(
                self._start,
                self.task,
                training=self.settings.competence_options({}),
                checkpoints=self.path / ".finetune",
                quiet=self.quiet,
            )
        self._shared.write_folder(proxy, trained.save)
        self._shared.remove(self.path / ".finetune")
        # From the folder, so that an interrupted run and a whole one continue with the same model.
        return load(proxy, device=self.settings.device)

    def _stage(
        self,
        name: str,
        kind: Any,
        make: Callable[..., Any],
        *needs: str,
        settings: Sequence[str] = ("seed",),
        planned: str = "",
    ) -> Any:
        """A result from its file, or made by ``make`` and written there.

        Args:
            name: of the file.
            kind: has ``load``; its results have ``save``.
            make: takes model, task, and the stages that it ``needs``.
            needs: their names; they are looked up only if the result has to be made.
            settings: keyword arguments of ``make`` that are settings of the same name.
            planned: name of the stage in the plan of a run, if it is not that of the file.
        """

        def made() -> Any:
            given = [getattr(self, need) for need in needs]
            options = {key: getattr(self.settings, key) for key in settings}
            shared = {**self.settings.batch_size, "quiet": self.quiet}
            self.outdate()
            return make(self.model, self.task, *given, **options, **shared)

        clock = self._clock.stage(planned or name.split(".")[0])
        return self._shared.kept(self.path / name, kind.load, made, clock)

    @cached_property
    def baseline(self) -> MeanBaseline:
        """Means of the heads."""
        how = ("baseline.safetensors", MeanBaseline, label_balanced_mean)
        settings = ("positions", "pooling", "reference", "allow_chance")
        return cast(MeanBaseline, self._stage(*how, settings=settings))

    @cached_property
    def scores(self) -> HeadScores:
        """Relevance of the heads."""
        how = ("scores.safetensors", HeadScores, relevance, "baseline")
        settings = (*SCORING, "seed")
        return cast(HeadScores, self._stage(*how, settings=settings, planned="relevance"))

    @cached_property
    def circuit(self) -> Circuit:
        """The circuit."""
        return self._shared.kept(
            self.path / "circuit.json",
            Circuit.load,
            lambda: self._choose(self.scores, self.settings.size),
        )

    def _choose(self, scores: HeadScores, size: int | float | str) -> Circuit:
        if not isinstance(size, str):
            return scores.top(size)
        given = (self.model, self.task, scores, self.baseline)
        options = {**self.settings.batch_size, "quiet": self.quiet}
        return smallest_circuit(*given, f=share_kept(size), **options)

    @cached_property
    def effects(self) -> HeadEffects:
        """What ablating each head of the circuit does."""
        how = ("effects.safetensors", HeadEffects, head_effects, "circuit", "baseline")
        return cast(HeadEffects, self._stage(*how, settings=("max_examples", "seed")))

    @cached_property
    def roles(self) -> HeadRoles:
        """What the heads of the circuit look at, and which labels they raise."""
        how = ("roles.json", HeadRoles, head_roles, "circuit", "baseline")
        return cast(HeadRoles, self._stage(*how, settings=("max_examples", "seed")))

    @cached_property
    def lens(self) -> MarginByLayer:
        """The task margin after every layer."""
        return cast(MarginByLayer, self._stage("lens.safetensors", MarginByLayer, margin_by_layer))

    @cached_property
    def curve(self) -> FaithfulnessCurve:
        """Faithfulness of the circuit and of larger and smaller ones."""

        def measured(*given: Any, **options: Any) -> FaithfulnessCurve:
            usual = default_sizes(len(self.model.geometry))
            sizes = [*usual, len(self.circuit), *self.settings.sizes]
            return faithfulness(*given, sizes=sizes, **options)

        how = ("faithfulness.safetensors", FaithfulnessCurve, measured, "scores", "baseline")
        return cast(FaithfulnessCurve, self._stage(*how, settings=("n_random", "seed")))

    def _transfer_path(self, target: str, strategy: str) -> Path:
        return self.path / "transfers" / safe_name(target) / safe_name(folder_of(strategy))

    def transfer(self, target: str, strategy: str) -> TransferResult:
        """Adapt the model to a target language, or load the finished transfer."""
        task = self.task.to(target)
        path = self._transfer_path(task.language, strategy)
        stage = f"transfer to {task.language}, {strategy}"
        if self._shared.there(path / "result.json"):
            self._clock.skip(stage)
            return self._checked(TransferResult.load(path))
        given = self.model, self.circuit, task
        options = {**self.settings.transferring, "rediscover": self.settings.rediscover}
        options |= {"scores": self.scores, "checkpoints": path / ".training"}
        with self._clock.stage(stage):
            result = transfer(*given, strategy=strategy, **options, quiet=self.quiet)
        if self._shared.writes:
            self.outdate()
            result.save(path)
        self._shared.remove(path / ".training")
        # The weights are in the folder; an adapted model per strategy would fill the memory.
        return replace(result, model=None, folder=path, _scratch=None)

    def transfers_by(
        self, executor: Runner | str, targets: Sequence[str], strategies: Sequence[str]
    ) -> None:
        """Run transfers that are not there yet side by side."""
        pairs = [(self.task.to(target), strategy) for target in targets for strategy in strategies]
        todo = [
            (task, strategy)
            for task, strategy in pairs
            if not (self._transfer_path(task.language, strategy) / "result.json").is_file()
        ]
        if todo:
            self.outdate()
            given = (self.model, self.circuit, self.scores, todo, self.settings)
            transfers_by(executor, *given, self._transfer_path, quiet=self.quiet)

    def _checked(self, result: TransferResult) -> TransferResult:
        if result.provenance.model_fingerprint != self.baseline.provenance.model_fingerprint:
            raise InputError(
                f"{self._transfer_path(result.target_language, result.strategy)} was trained from "
                "other weights than the baseline of this run was taken from: remove that folder, "
                "or start a new run."
            )
        return result

    def transfers(self) -> list[TransferResult]:
        """All finished transfers of the folder, the run's own targets first."""
        return [self._checked(r) for r in saved_transfers(self.path / "transfers", self._targets())]

    def _targets(self) -> list[str]:
        """The run's target languages, as the source of the data names them."""
        source = self.task.source
        return [source.resolve(name) if source else name for name in self.settings.targets]

    @property
    def finished(self) -> bool:
        """Whether all that the settings ask for is there."""
        files = (self.path / name for name in ("faithfulness.safetensors", "report.html"))
        return all(file.is_file() for file in files) and all(
            (self._transfer_path(*pair) / "result.json").is_file()
            for pair in product(self._targets(), self.settings.strategies)
        )

    def discover_again(self, changes: Mapping[str, Any], *, backup: bool = True) -> Path | None:
        """Score the heads and choose the circuit by other settings.

        Args:
            changes: the settings that change.
            backup: keep the results of the old circuit, in a separate folder; else remove them.

        Returns:
            The folder with the old results, if they are kept.
        """
        settings = replace(self.settings, **changes)
        given = self.model, self.task, self.baseline
        scores = relevance(*given, **settings.scoring, quiet=self.quiet)
        circuit = self._choose(scores, settings.size)
        self.settings, self._given = settings, replace(self._given, **changes)
        old = None
        if self._shared.writes:
            record = self._record(None, None, finished=False)
            backup = backup and (self.path / "circuit.json").is_file()
            old = exchange(self.path, record, scores, circuit, backup=backup)
        self._shared.wait()
        for name in ("scores", "circuit", "effects", "roles", "curve"):
            self.__dict__.pop(name, None)
        _ = self.effects, self.roles
        self.write_record()
        return old

    # -- output ----------------------------------------------------------------------------

    def _found(self) -> Found:
        """Discovery, with the checks that are there."""

        def stage(name: str, file: str) -> Any:
            return getattr(self, name) if self._shared.there(self.path / file) else None

        return Found(
            self.baseline,
            self.scores,
            self.circuit,
            stage("effects", "effects.safetensors"),
            stage("roles", "roles.json"),
            stage("lens", "lens.safetensors"),
            stage("curve", "faithfulness.safetensors"),
        )

    def report(self) -> Path:
        """Write the report of what is there."""
        page = self.path / "report.html"
        # All of it may be a stage that processes share.
        given = self.task, self._given, self._found(), self.transfers()
        trained = self._shared.there(self.path / "proxy")
        compared = self._shared.there(self.path / "compare" / "comparison.json")
        if self._shared.writes:
            folder = self.path / "compare" if compared else None
            report_of(page, *given, trained=trained, comparison=folder)
        return page

    def write_record(self) -> None:
        """Write ``run.json`` with all numbers that are there."""
        there = self._shared.there
        found = self._found() if there(self.path / "circuit.json") else None
        results = self.transfers() if there(self.path / "transfers") else None
        record = self._record(found, results, finished=self.finished)
        if self._shared.writes:
            write_json(self.path / "run.json", RUN_SCHEMA, record)
        self._shared.wait()

    def _record(self, *numbers: Any, finished: bool) -> dict[str, Any]:
        record = record_of(self._given, *numbers, finished=finished)
        return {**record, "begun_in": self._begun_in}

    def outdate(self) -> None:
        """Remove the report, as numbers come that it does not have."""
        if self._shared.writes:
            (self.path / "report.html").unlink(missing_ok=True)

    def run_all(self, executor: Runner | str | None = None) -> Sequence[TransferResult]:
        """Run all stages that are not finished, and write record and report.

        Args:
            executor: runs the transfers, as of :func:`circuitlens.compare`; by default they are
                run here, one by one.
        """
        if interactive() and not self.quiet:
            # Measures two batches, which only people who watch want.
            planned = plan_run(self._start, self.task, self.settings).stages
            self._clock.begin({stage.name: stage.seconds for stage in planned})
        logger.info("Discovery: %r", self.circuit)
        log_checks(self.circuit, self.curve, self.effects)
        _ = self.roles, self.lens
        self.write_record()
        if executor is not None:
            self.transfers_by(executor, self.settings.targets, self.settings.strategies)
        pairs = product(self.settings.targets, self.settings.strategies)
        results = [self.transfer(target, strategy) for target, strategy in pairs]
        self.report()
        self.write_record()
        return results
