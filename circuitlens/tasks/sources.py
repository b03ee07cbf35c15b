"""Data sets known by name: NusaX, SmSA, AmericasNLI, XNLI, and the built-in toy languages.

Folders have the layout of the data sets' own repositories; without a folder the hub is asked.
Lists of known faults beside the data are honoured, and the log says how many rows that cost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlens.errors import InputError
from circuitlens.tasks.examples import Example
from circuitlens.tasks.files import dataset_records, read_rows, to_examples
from circuitlens.tasks.task import COLUMNS, OPTIONS, Source, Task, check_options

__all__ = ["AmericasNLI", "NusaX", "SmSA", "Xnli", "load_task"]

logger = logging.getLogger(__name__)


def _pick(language: str, known: Mapping[str, str] | Sequence[str], what: str) -> str:
    """Resolve a language name or code; the error lists what there is."""
    key = language.strip().lower().replace(" ", "_")
    names = dict(known) if isinstance(known, Mapping) else {name: name for name in known}
    if key in names:
        return names[key]
    raise InputError(
        f"{what} has no language {language!r}; it has {', '.join(sorted(set(names.values())))}."
    )


def _refuse_foreign(languages: Sequence[str], folder: Path, what: str, holds: str) -> None:
    """Say of a folder that is not the right one what it should hold, and not a list of nothing."""
    if not languages:
        raise InputError(
            f"The data folder {folder} holds no language of {what}; it should hold {holds}."
        )


def _folder(path: str | Path, *, holds: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"The data folder {folder} does not exist; it should hold {holds}.")
    return folder


def _from_hub(repository: str, configuration: str, **options: Any) -> Any:
    """Load a configuration of a hub data set; a failed download says what to do."""
    import datasets

    try:
        return datasets.load_dataset(repository, configuration, **options)
    except Exception as error:
        raise InputError(
            f"{repository} ({configuration}) could not be loaded from the hub "
            f"({type(error).__name__}); without network, give a local folder: data=… or --data."
        ) from error


# -- NusaX ---------------------------------------------------------------------------------

_NUSAX_CODES = {
    "ace": "acehnese",
    "ban": "balinese",
    "bjn": "banjarese",
    "bug": "buginese",
    "eng": "english",
    "ind": "indonesian",
    "jav": "javanese",
    "mad": "madurese",
    "min": "minangkabau",
    "nij": "ngaju",
    "sun": "sundanese",
    "bbc": "toba_batak",
}


_NUSAX_LAYOUT = "<language>/train.csv, valid.csv and test.csv, such as indonesian/train.csv"


@dataclass(frozen=True)
class NusaX:
    """NusaX-Senti (Winata et al., EACL 2023): sentiment in 12 parallel languages.

    Attributes:
        folder: ``<language>/{train,valid,test}.csv`` as in the data set's repository; ``None``
            reads ``indonlp/NusaX-senti`` from the hub.
    """

    folder: Path | None = None

    @property
    def languages(self) -> Sequence[str]:
        """The languages that the folder holds."""
        names = sorted(_NUSAX_CODES.values())
        if self.folder is None:
            return names
        folder = _folder(self.folder, holds=_NUSAX_LAYOUT)
        return [name for name in names if (folder / name).is_dir()]

    def resolve(self, language: str) -> str:
        """Accept names and ISO 639-3 codes."""
        have = self.languages
        if self.folder is not None:
            _refuse_foreign(have, self.folder, "NusaX", _NUSAX_LAYOUT)
        known = {name: name for name in have}
        known |= {code: name for code, name in _NUSAX_CODES.items() if name in have}
        return _pick(language, known, "NusaX")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits; rows named in ``known_issues.tsv`` are left out."""
        options: dict[str, Any] = {"fields": ["text"], "label": "label", "id": "id", "group": None}
        if self.folder is None:
            code = next(c for c, name in _NUSAX_CODES.items() if name == language)
            # The repository is script-based, which `datasets` no longer runs; the hub keeps a
            # converted copy of every such repository under this revision.
            hub = _from_hub("indonlp/NusaX-senti", code, revision="refs/convert/parquet")
            return {
                name: to_examples(rows, split=name, where=f"NusaX {language} {name}", **options)
                for name, rows in dataset_records(hub, "label").items()
            }
        faulty = self._faulty(language)
        splits: dict[str, Sequence[Example]] = {}
        left_out = 0
        for file, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
            path = self.folder / language / f"{file}.csv"
            rows = read_rows(path)
            found = to_examples(rows, split=name, where=str(path), **options)
            splits[name] = [e for e in found if (file, e.id) not in faulty]
            left_out += len(found) - len(splits[name])
        if left_out:
            logger.info(
                "NusaX %s: %d rows with known faults left out (known_issues.tsv).",
                language,
                left_out,
            )
        return splits

    def _faulty(self, language: str) -> set[tuple[str, str]]:
        path = Path(self.folder or "") / "known_issues.tsv"
        if not path.is_file():
            return set()
        rows = read_rows(path, quoting=False)
        return {(row["split"], row["id"]) for row in rows if row["language"] == language}


# -- SmSA ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmSA:
    """SmSA (Purwarianti and Crisdayanti, 2019; IndoNLU): Indonesian sentiment.

    NusaX was made from SmSA, so a model trained on all of it has seen the source of every NusaX
    test sentence: rows named in ``overlap_with_nusax.txt`` are left out.

    Attributes:
        folder: holds ``{train,valid,test}_preprocess.tsv`` as in IndoNLU.
    """

    folder: Path

    @property
    def languages(self) -> Sequence[str]:
        """Indonesian."""
        return ("indonesian",)

    def resolve(self, language: str) -> str:
        """Accept the name and the ISO 639-3 code."""
        return _pick(language, {"indonesian": "indonesian", "ind": "indonesian"}, "SmSA")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits without the rows that NusaX repeats."""
        folder = _folder(self.folder, holds="train_preprocess.tsv")
        overlap: set[tuple[str, int]] = set()
        listing = folder / "overlap_with_nusax.txt"
        if listing.is_file():
            for line in listing.read_text(encoding="utf-8").splitlines():
                if line and not line.startswith("#"):
                    split, row = line.split("\t")
                    overlap.add((split, int(row)))
        splits: dict[str, Sequence[Example]] = {}
        for file, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
            path = folder / f"{file}_preprocess.tsv"
            table = read_rows(path, quoting=False, columns=["text", "label"])
            rows = [
                {**row, "id": f"{file}:{number}"}
                for number, row in enumerate(table, start=1)
                if (file, number) not in overlap
            ]
            splits[name] = to_examples(
                rows,
                fields=["text"],
                label="label",
                id="id",
                group=None,
                split=name,
                where=str(path),
            )
        if overlap:
            logger.info("SmSA: %d rows left out (overlap_with_nusax.txt).", len(overlap))
        return splits


# -- natural language inference ------------------------------------------------------------

_AMERICAS_CODES = {
    "aym": "aymara",
    "bzd": "bribri",
    "cni": "ashaninka",
    "gn": "guarani",
    "hch": "wixarika",
    "nah": "nahuatl",
    "oto": "otomi",
    "quy": "quechua",
    "shp": "shipibo_konibo",
    "tar": "raramuri",
}


_AMERICAS_LAYOUT = "dev/<code>.tsv and test/<code>.tsv, such as dev/quy.tsv"


@dataclass(frozen=True)
class AmericasNLI:
    """AmericasNLI (Ebrahimi et al., ACL 2022): inference in 10 parallel languages.

    There is no train split: the dev split is divided into pools A and B and validation. Three
    hypotheses share a premise, and pools never tear them apart.

    Attributes:
        folder: ``{dev,test}/<code>.tsv`` as in the data set's repository.
    """

    folder: Path

    @property
    def languages(self) -> Sequence[str]:
        """Codes of the languages that the folder holds."""
        folder = _folder(self.folder, holds=_AMERICAS_LAYOUT)
        return [c for c in _AMERICAS_CODES if (folder / "dev" / f"{c}.tsv").is_file()]

    def resolve(self, language: str) -> str:
        """Accept the codes of the data set and names."""
        have = self.languages
        _refuse_foreign(have, self.folder, "AmericasNLI", _AMERICAS_LAYOUT)
        known = {code: code for code in have}
        known |= {name: code for code, name in _AMERICAS_CODES.items() if code in have}
        return _pick(language, known, "AmericasNLI")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read dev and test; dev is divided by premise."""
        dev, test = (self._read(split, language) for split in ("dev", "test"))
        # The validation split may not depend on the pools' seed: choices are made on it.
        validation = [e for e in dev if int(e.group.removeprefix("premise-")) % 5 == 0]
        taken = {e.id for e in validation}
        return {
            "train": [e for e in dev if e.id not in taken],
            "validation": validation,
            "test": test,
        }

    def _read(self, split: str, language: str) -> list[Example]:
        path = Path(self.folder) / split / f"{language}.tsv"
        rows: list[dict[str, Any]] = []
        blank = 0
        for row in read_rows(path, quoting=False):
            if not str(row["premise"]).strip() or not str(row["hypothesis"]).strip():
                blank += 1
                continue
            # Ids are the row numbers of XNLI's files, in which every premise has three rows.
            rows.append({**row, "premise_id": f"premise-{(int(row['id']) - 1) // 3}"})
        if blank:
            logger.info("AmericasNLI %s: %d rows without premise left out.", language, blank)
        return to_examples(
            rows,
            fields=["premise", "hypothesis"],
            label="label",
            id="id",
            group="premise_id",
            split=split,
            where=str(path),
        )


_XNLI_LANGUAGES = [
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
]


@dataclass(frozen=True)
class Xnli:
    """XNLI (Conneau et al., EMNLP 2018), one configuration a language.

    Attributes:
        folder: ``<language>/{train,validation,test}*.parquet`` as on the hub; ``None`` reads
            ``facebook/xnli`` from there.
    """

    folder: Path | None = None

    @property
    def languages(self) -> Sequence[str]:
        """ISO 639-1 codes."""
        return _XNLI_LANGUAGES

    def resolve(self, language: str) -> str:
        """Accept the codes."""
        return _pick(language, _XNLI_LANGUAGES, "XNLI")

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the three splits."""
        if self.folder is None:
            hub = _from_hub("facebook/xnli", language)
        else:
            hub = _parquet_folder(self.folder / language)
        splits: dict[str, Sequence[Example]] = {}
        for name, rows in dataset_records(hub, "label").items():
            # Rows are the same in all languages. Those of one premise belong together; the number
            # of the first of them names the premise whatever the language.
            first: dict[str, int] = {}
            numbered: Iterable[dict[str, Any]] = (
                {
                    **row,
                    "id": f"{name}:{n}",
                    "premise_id": f"{name}:{first.setdefault(row['premise'], n)}",
                }
                for n, row in enumerate(rows)
            )
            splits[name] = to_examples(
                numbered,
                fields=["premise", "hypothesis"],
                label="label",
                id="id",
                group="premise_id",
                split=name,
                where=f"XNLI {language} {name}",
            )
        return splits


def _parquet_folder(folder: Path) -> Any:
    """Open a folder of ``<split>*.parquet`` files as the hub lays them out."""
    import datasets

    names = ("train", "validation", "test")
    files = {
        name: sorted(map(str, _folder(folder, holds="parquet files").glob(f"{name}*.parquet")))
        for name in names
    }
    if missing := [name for name in names if not files[name]]:
        raise InputError(f"The data folder {folder} has no {missing[0]}*.parquet file.")
    return datasets.load_dataset("parquet", data_files=files)


# -- the registry --------------------------------------------------------------------------

_SENTIMENT = {
    "template": "{text} sentimen:",
    "labels": {"negative": " negatif", "neutral": " netral", "positive": " positif"},
}
_INFERENCE = {
    "template": "{premise} Question: {hypothesis} True, False or Neither? Answer:",
    "labels": {"entailment": " True", "neutral": " Neither", "contradiction": " False"},
}


def _toy(data: str | Path | None) -> Source:
    from circuitlens.tasks.toy import ToyLanguages

    if data is not None:
        raise InputError("The toy task makes its own data: leave data (--data) out.")

    return ToyLanguages()


def _needs_folder(name: str, data: str | Path | None) -> Path:
    if data is None:
        raise InputError(f"{name} is read from a local folder only: give data=… (--data).")
    return Path(data)


def _known() -> dict[str, tuple[Callable[[str | Path | None], Source], dict[str, Any], str]]:
    """Tasks by name: how to open the source, prompt and labels, the first language."""
    from circuitlens.tasks.toy import TOY_PROMPT

    return {
        "nusax": (lambda d: NusaX(None if d is None else Path(d)), _SENTIMENT, "indonesian"),
        "smsa": (lambda d: SmSA(_needs_folder("SmSA", d)), _SENTIMENT, "indonesian"),
        "americasnli": (
            lambda d: AmericasNLI(_needs_folder("AmericasNLI", d)),
            _INFERENCE,
            "quy",
        ),
        "xnli": (lambda d: Xnli(None if d is None else Path(d)), _INFERENCE, "en"),
        "toy": (_toy, TOY_PROMPT, "source"),
    }


def load_task(
    name: str, language: str | None = None, *, data: str | Path | None = None, **options: Any
) -> Task:
    """Load a task by the name of its data set, or from a file.

    Args:
        name: ``nusax``, ``smsa``, ``americasnli``, ``xnli``, ``toy``, or the path of a CSV, TSV,
            JSONL or Parquet file (see :meth:`Task.from_file`).
        language: a name or a code; the default is the data set's usual source language.
        data: local folder of the data set; without it, NusaX and XNLI come from the hub.
        options: ``template``, ``labels``, ``seed``, ``share_a``, ``max_text_tokens``,
            ``tokenizer`` (checks the label words at once); for a file, also its columns, as
            ``label``, ``id`` and ``group``.

    Raises:
        InputError: for an unknown task, language or option (the known ones are listed), a missing
            folder or file, or data that cannot be used.
    """
    known = _known()
    if name not in known:
        if Path(name).suffix or "{language}" in name or Path(name).is_dir():
            if data is not None:
                raise InputError(f"{name} is a data file itself: leave data (--data) out.")
            check_options(options, (*COLUMNS, *OPTIONS), name)
            return Task.from_file(name, language=language or "unnamed", **options)
        raise InputError(
            f"There is no task {name!r}; known are {', '.join(known)}, or give the path of a data "
            "file."
        )
    check_options(options, OPTIONS, name)
    open_source, defaults, first = known[name]
    return Task.from_source(
        open_source(data), language or first, name=name, **{**defaults, **options}
    )
