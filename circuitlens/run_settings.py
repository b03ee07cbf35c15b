"""Everything that is chosen for a run: the arguments of ``circuitlens run``.

The command line is made from the fields and their documentation here, and checks them before torch
is imported, which takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlens import catalogue
from circuitlens.adapt.options import (
    COMPETENCE,
    DEFAULT_RATES,
    DEFAULT_STRATEGIES,
    TRANSFER,
    TrainingOptions,
    check_keep_source,
    replays_of,
    training_tries,
)
from circuitlens.errors import InputError, check_choice

if TYPE_CHECKING:
    from circuitlens.models.hooked import HookedModel
    from circuitlens.tasks import Task

__all__ = [
    "CHOICES",
    "PEFT_FILE",
    "SCORING",
    "TOY",
    "RunSettings",
    "check_run",
    "folder_of",
    "refuse_other_run",
    "share_kept",
    "wants_share_kept",
]

# The size of the smallest circuit that keeps 0.8 of the margin.
FAITHFUL = "faithful"

TOY = "toy"

# The allowed values of a field; for tuples, those of their items.
CHOICES: dict[str, tuple[str, ...]] = {
    "competence": ("auto", "always", "never"),
    "readout": catalogue.choices("models/prompt.py", "READOUTS"),
    "positions": catalogue.choices("models/batch.py", "Positions"),
    "pooling": catalogue.choices("baseline.py", "Pooling"),
    "reference": catalogue.choices("baseline.py", "Reference"),
    "method": tuple(catalogue.scorers()),
    "path": catalogue.choices("cdt/gradient.py", "Path"),
    "strategies": tuple(catalogue.strategies()),
    "kv_policy": catalogue.choices("adapt/choice.py", "KVPolicy"),
    "dtype": ("auto", *catalogue.choices("models/loading.py", "_DTYPES")),
}
# Before the path of a configuration of PEFT, among the strategies.
PEFT_FILE = "peft:"
# How a model is asked, besides template and words.
STYLE = ("readout", "bos", "chat", "system", "choices")
# Scores follow from these, and from the seed.
SCORING = (
    *("method", "mlps", "by_position", "path", "steps", "rounds", "share", "candidates"),
    "max_examples",
)


def wants_share_kept(size: object) -> bool:
    """Whether a size is the share of the margin to keep, and not a number or share of heads."""
    return isinstance(size, str) and (size == FAITHFUL or size.startswith("f="))


def share_kept(size: str) -> float:
    """Read the share of the margin that a circuit is to keep: ``faithful`` or ``f=0.9``.

    Raises:
        InputError: for anything else.
    """
    try:
        share = 0.8 if size == FAITHFUL else float(size.removeprefix("f="))
    except ValueError:
        share = 0.0
    if not (wants_share_kept(size) and 0 < share <= 1):
        raise InputError(
            f"A size is a number of heads (8), a share of them (0.25), {FAITHFUL!r}, or a share "
            f"of the margin to keep ('f=0.9'), but is {size!r}."
        )
    return share


def folder_of(strategy: str) -> str:
    """Name of a strategy's folder; a file of a configuration counts by what it holds.

    Raises:
        InputError: if there is no such file.
    """
    if not strategy.startswith(PEFT_FILE):
        return strategy
    path = Path(strategy.removeprefix(PEFT_FILE))
    if not path.is_file():
        raise InputError(f"There is no PEFT configuration file {path}.")
    return f"peft-{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:6]}"


def check_run(folder: Path) -> None:
    """Reject a folder that contains no run.

    Raises:
        InputError: naming it.
    """
    if not (folder / "run.json").is_file():
        raise InputError(
            f"{folder} contains no circuitlens run (no run.json): start one with circuitlens run."
        )


def refuse_other_run(folder: Path, record: Mapping[str, Any], settings: RunSettings) -> None:
    """Refuse to resume a run that is finished, or has other settings.

    Args:
        folder: of the run.
        record: content of its ``run.json``.
        settings: asked for now.

    Raises:
        InputError: naming the setting.
    """
    if record["finished"]:
        raise InputError(
            f"{folder} contains a finished run: choose another --out, or use the single stages "
            "(circuitlens transfer, report, …) on it."
        )
    stored = RunSettings.from_dict(record["settings"])
    if stored == settings:
        return
    before, now = stored.to_flat(), settings.to_flat()
    name = next(key for key in now if now[key] != before[key])
    raise InputError(
        f"{folder} has an unfinished run with other settings ({name} was {before[name]!r}, now "
        f"{now[name]!r}): choose another --out, or the old settings."
    )


@dataclass(frozen=True)
class RunSettings:
    """Everything that is chosen for a run.

    Attributes:
        model: hub name or local folder; `toy` makes the built-in small model.
        task: name of a data set, or a CSV, TSV, JSONL or Parquet file; `{language}` in its path
            stands for the language.
        source: source language; default: the data set's usual one.
        targets: target language.
        data: local folder of the data set; default: the hub.
        template: prompt with the fields in braces: '{text} sentimen:'.
        labels: answer word of a label: 'positive= positif'; several for a label mean the same.
        readout: how answers are read; auto uses the simplest that tells the labels apart.
        bos: begin prompts with the tokenizer's first token, or not; default: as the tokenizer does.
        chat: put prompts into the chat template of the tokenizer.
        system: system prompt of the chat.
        choices: column that holds one of the possible answers, where each example brings its own.
        columns: columns of a data file: label=NAME, id=NAME or group=NAME.
        encoding: encoding of a data file without a byte order mark, if not UTF-8, such as cp1252.
        share_a: share of the training data for discovery (pool A); the rest is for transfer.
        max_text_tokens: longer texts are cut at their end.
        classifier: use a classification head for the labels of the task, in their order; a
            checkpoint without one gets a new one, which the competence stage trains.
        revision: branch, tag or commit of a model on the hub.
        dtype: floating-point type of the weights; auto is the checkpoint's own.
        device: device of the model, such as cpu or cuda:0.
        competence: fine-tune on the source first: auto (if the model is near chance), always or
            never.
        finetuning: of the competence stage.
        positions: where heads deviate from their means.
        pooling: one mean for all positions, or one for each position.
        reference: what heads are measured from and set to: means in which every label counts the
            same, plain means, or zero.
        allow_chance: continue even if the model does no better than chance.
        method: scorer of the heads.
        mlps: score MLPs too.
        by_position: score heads at every single position too.
        path: let relevance pass through later heads (total), or not (direct).
        steps: number of steps of integrated-gradients.
        rounds: number of rounds of sampled.
        share: share of the remaining heads that iterative removes in each round.
        candidates: scorers that auto chooses from.
        max_examples: maximum number of examples for discovery; default: all correct ones.
        size: heads in the circuit: a number (8) or a share (0.25), or ``faithful`` for the fewest
            that keep f = 0.8 of the margin (``f=0.9`` for another share).
        sizes: further circuit sizes in the faithfulness curve.
        n_random: random circuits for each size, and as many matched layer by layer.
        analysis_batch_size: examples per forward pass in discovery and faithfulness; sets memory,
            not the results.
        strategies: what a transfer trains; `peft:FILE.json` is a configuration of PEFT.
        learning_rates: learning rate of the transfer; the best of several is chosen on validation.
        training: of the transfer.
        replay: source examples per target example that are mixed into the training data; the best
            of several is chosen on validation.
        keep_source: source accuracy that may be lost on validation, as a share (0.01 is one point);
            the strength of the adaptation is chosen with the rate; default: any.
        kv_policy: which key/value heads are trained under grouped-query attention.
        retain: another language in which accuracy is measured before and after the transfer.
        rediscover: run discovery of the source circuit again on the adapted model.
        test_front: measure the front of every transfer on test too, once everything is chosen.
        seed: everything random follows from it; the same numbers need the same number of threads,
            device and library versions too, which every result records.

    Raises:
        InputError: for settings that no run could work with.
    """

    model: str
    task: str
    source: str | None = None
    targets: tuple[str, ...] = ()
    data: str | None = None
    template: str | None = None
    labels: dict[str, Any] | None = None
    readout: str = "auto"
    bos: bool | None = None
    chat: bool = False
    system: str = ""
    choices: tuple[str, ...] = ()
    columns: dict[str, str] | None = None
    encoding: str | None = None
    share_a: float | None = None
    max_text_tokens: int | None = None
    classifier: bool = False
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    competence: str = "auto"
    finetuning: TrainingOptions | None = None
    positions: str = "all"
    pooling: str = "pooled"
    reference: str = "label-balanced"
    allow_chance: bool = False
    method: str = "cdt-linear"
    mlps: bool = False
    by_position: bool = False
    path: str = "total"
    steps: int = 5
    rounds: int = 8
    share: float = 0.4
    candidates: tuple[str, ...] = ("cdt-linear", "sampled")
    max_examples: int | None = None
    size: float | int | str = 0.25
    sizes: tuple[float | int, ...] = ()
    n_random: int = 30
    analysis_batch_size: int | None = None
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    learning_rates: tuple[float, ...] = DEFAULT_RATES
    training: TrainingOptions = TRANSFER
    replay: tuple[float, ...] = (0.0,)
    keep_source: float | None = None
    kv_policy: str = "shared"
    retain: tuple[str, ...] = ()
    rediscover: bool = False
    test_front: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if name != "strategies" or not str(item).startswith(PEFT_FILE):
                    check_choice(name, item, known)
        if unknown := sorted(set(self.columns or ()) - set(_columns())):
            raise InputError(
                f"There is no column {unknown[0]!r} to name: use one of {', '.join(_columns())}; "
                "texts are the columns that the template names."
            )
        if isinstance(self.size, str):
            share_kept(self.size)
        if self.n_random < 1:
            raise InputError(f"n_random must be positive, but is {self.n_random}.")
        # Runs from before version 0.2 have one number.
        object.__setattr__(self, "replay", replays_of(self.replay))
        check_keep_source(self.keep_source)
        # The seed of the run is that of its trainings.
        object.__setattr__(self, "training", self.training.updated({"seed": self.seed}))
        object.__setattr__(self, "finetuning", self.competence_options({}))
        training_tries(self.learning_rates, self.training, {})

    def competence_options(self, changes: Mapping[str, Any]) -> TrainingOptions:
        """How the competence stage trains, with some fields changed.

        Anything not given follows the toy model's or the usual options, and parts and precision
        those of the transfer.
        """
        options = self.finetuning
        if options is None:
            given = {"accumulation": self.training.accumulation, "bf16": self.training.bf16}
            toy = catalogue.constant("tasks/toy.py", "TOY_FINETUNE") if self.model == TOY else {}
            options = COMPETENCE.updated({**given, **toy})
        return options.updated({**changes, "seed": self.seed})

    def to_flat(self) -> dict[str, Any]:
        """All settings by name, those of trainings as ``training.epochs``; for people to read."""
        names = [f.name for f in fields(self) if f.name not in ("training", "finetuning")]
        flat = {name: getattr(self, name) for name in names}
        for part in ("finetuning", "training"):
            options = getattr(self, part).to_dict()
            flat |= {f"{part}.{k}": v for k, v in options.items() if k != "seed"}
        # Of transfers there are several.
        del flat["training.learning_rate"]
        return flat

    def seen_from(self, folder: Path) -> RunSettings:
        """The same settings, with paths that lead somewhere from another folder made absolute."""

        def there(value: str) -> str:
            path = Path(value)
            # For a pattern such as {language}.csv only the folder is sure to exist.
            sure = path if not set("{*?[") & set(path.name) else path.parent
            known = not path.is_absolute() and (folder / sure).exists()
            return str((folder / path).resolve()) if known else value

        def strategy(name: str) -> str:
            file = name.removeprefix(PEFT_FILE)
            return name if file == name else PEFT_FILE + there(file)

        return replace(
            self,
            model=there(self.model),
            task=there(self.task),
            data=None if self.data is None else there(self.data),
            strategies=tuple(strategy(name) for name in self.strategies),
        )

    def check_names(self) -> None:
        """Look for misspelt names, without importing anything slow.

        Raises:
            InputError: if there is no such data set, file or folder.
        """
        catalogue.check_task(self.task, catalogue.data_sets())
        for name in self.strategies:
            path = Path(name.removeprefix(PEFT_FILE))
            if name.startswith(PEFT_FILE) and not path.is_file():
                raise InputError(f"There is no configuration file {path}: check --strategy.")
        if self.data is not None and not Path(self.data).exists():
            raise InputError(f"There is no data folder {self.data}: check --data.")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunSettings:
        """Rebuild settings from JSON, those of runs from before version 0.2 too."""
        content = dict(content)
        if "epochs" in content:
            shared = {name: content.pop(name) for name in ("accumulation", "bf16")}
            content["training"] = {"epochs": content.pop("epochs"), **shared}
            old = {name: content.pop(f"finetune_{name}") for name in ("rate", "epochs")}
            given = {"learning_rate": old["rate"], "epochs": old["epochs"]}
            changes = {name: value for name, value in given.items() if value is not None}
        else:
            changes = content.pop("finetuning", None) or {}
        training = TRANSFER.updated(content.pop("training", {}))
        if content.get("labels"):
            words = content["labels"].items()
            content["labels"] = {k: tuple(v) if isinstance(v, list) else v for k, v in words}
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        plain = cls(**arguments, training=training)
        return replace(plain, finetuning=plain.competence_options(changes))

    def open_task(self) -> Task:
        """Load the task in the source language."""
        from circuitlens.tasks import load_task

        options: dict[str, Any] = {"seed": self.seed, **(self.columns or {})}
        usual = {f.name: f.default for f in fields(self)}
        for name in ("template", "labels", "share_a", "max_text_tokens", "encoding", *STYLE):
            if (value := getattr(self, name)) != usual[name]:
                options[name] = value
        return load_task(self.task, self.source, data=self.data, **options)

    def open_model(self, task: Task) -> HookedModel:
        """Load the model; the name ``toy`` makes the untrained toy model."""
        from circuitlens.models.loading import find_device
        from circuitlens.opening import load
        from circuitlens.tasks.toy import toy_model

        if self.model == TOY:
            if self.dtype not in ("auto", "float32"):
                raise InputError(f"The toy model is made in float32, not in {self.dtype}.")
            toy = toy_model(self.seed)
            if (device := find_device(self.device)) is not None:
                toy.hf.to(device)
            return toy
        return load(
            self.model,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            labels=task if self.classifier else (),
        )

    @property
    def batch_size(self) -> dict[str, Any]:
        """The batch size of the analysis as a keyword argument, if one was given."""
        if self.analysis_batch_size is None:
            return {}
        return {"batch_size": self.analysis_batch_size}

    @property
    def scoring(self) -> dict[str, Any]:
        """Keyword arguments of :func:`circuitlens.relevance`."""
        return {name: getattr(self, name) for name in (*SCORING, "seed")} | self.batch_size

    @property
    def transferring(self) -> dict[str, Any]:
        """Keyword arguments of transfers and comparisons alike."""
        names = ("learning_rates", "training", "replay", "keep_source", "kv_policy", "retain")
        return {name: getattr(self, name) for name in (*names, "test_front")}


def _columns() -> tuple[str, ...]:
    return catalogue.choices("tasks/task.py", "COLUMNS")
