"""Reading examples from records, files and ``datasets``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, cast

import pandas as pd

from circuitlens.errors import InputError
from circuitlens.models.media import MEDIA
from circuitlens.tasks.examples import Example
from circuitlens.tasks.media_fields import read_media
from circuitlens.tasks.reading import SUFFIXES, data_suffix, read_rows, refuse_doubled, stem

__all__ = [
    "FileSource",
    "RecordSource",
    "Rows",
    "dataset_records",
    "name_of_files",
    "sorted_labels",
    "to_examples",
]

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
Rows = Iterable[Mapping[str, Any]] | pd.DataFrame


# Columns that hold an id, where none is named.
_ID_COLUMNS = ("id", "index_id", "idx", "sentence_id", "example_id", "guid", "uid", "pairid")


def _counterfactual_columns(name: str, fields: Sequence[str]) -> tuple[str, ...]:
    own = f"counterfactual_{name}"
    return (own, "counterfactual") if len(fields) == 1 else (own,)


def to_examples(
    rows: Iterable[Mapping[str, Any]],
    *,
    fields: Sequence[str],
    label: str,
    id: str | None,  # noqa: A002
    group: str | None,
    split: str,
    where: str,
    folder: Path | None = None,
) -> list[Example]:
    """Turn rows into examples; without an id column they are numbered within their split.

    Where none is named (``None``), a column called ``id``, ``index_id``, ``idx`` or the like is
    used, and the log says so; ``""`` numbers the rows whatever columns there are.

    The text of a column ``counterfactual_FIELD`` (or ``counterfactual``, where there is one field)
    replaces that field in the counterfactual prompt.

    A column ``audio`` or ``image`` may hold sounds and images as ``datasets`` gives them, or names
    of files, looked up in ``folder`` (that of the data file) or the working directory.

    Row numbers are shared by the languages of a parallel corpus, so its pools stay leak-safe.

    Raises:
        InputError: naming a missing column and those that are there, or a row that is not a mapping
            or has no id or no label.
    """
    examples: list[Example] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(
                f"Row {number + 1} of {where} is {row!r}, but must map column names to values, "
                f"such as {{{fields[0]!r}: …, {label!r}: …}}."
            )
        if number == 0 and id is None:
            id = _id_column(row, {*fields, label, group}, where)  # noqa: A001
        for column in (*fields, label, *(c for c in (id, group) if c)):
            if column not in row:
                raise InputError(
                    f"{where} has no column {column!r}; its columns are {list(row)} (its first "
                    "row, if it has no header: add one)."
                )
        texts = {name: _field(row[name], name, number, where, folder) for name in fields}
        others = {
            name: _field(row[column], name, number, where, folder)
            for name in fields
            for column in _counterfactual_columns(name, fields)
            if column in row
        }
        examples.append(
            Example(
                id=_text(row[id], id, number, where) if id else f"{split}:{number}",
                fields=texts,
                label=_text(row[label], label, number, where),
                group=_text(row[group], group, number, where) if group else "",
                counterfactual=others,
            )
        )
        for needed, value in ((id, examples[-1].id), (label, examples[-1].label)):
            if not value:
                hint = "fill it in or remove the row"
                if needed == label:
                    hint += (
                        "; where pandas treated a word such as None, NA or null as a missing cell, "
                        "read the file with keep_default_na=False"
                    )
                raise InputError(
                    f"{where} has no {needed!r} in row {number + 1}: every row needs one; {hint}."
                )
    return examples


def _field(value: Any, name: str, number: int, where: str, folder: Path | None) -> Any:
    """A text, or a sound or image."""
    if name not in MEDIA:
        return _text(value, name, number, where)
    return read_media(name, value, f"Row {number + 1} of {where}", folder)


def _id_column(row: Mapping[str, Any], taken: set[str | None], where: str) -> str | None:
    """The column that holds ids by its name, if there is one."""
    found = [name for name in row if str(name).lower() in _ID_COLUMNS and name not in taken]
    if not found:
        return None
    logger.info("Ids of %s are those of its column %r.", where, found[0])
    return found[0]


def _text(value: Any, column: str, number: int, where: str) -> str:
    """Text of a cell; what is missing (None, NaN, NA) is empty, not the word for it.

    Numbers are written as whole ones where they are: a column of whole numbers with a gap becomes
    one of floating-point numbers on its way through pandas.

    Raises:
        InputError: for a cell that holds several values.
    """
    if isinstance(value, str):
        return value.strip()
    # Scalars of numpy, torch and Arrow.
    for method in ("item", "as_py"):
        if callable(plain := getattr(value, method, None)) and getattr(value, "ndim", 0) == 0:
            value = plain()
            break
    if not pd.api.types.is_scalar(value):
        raise InputError(
            f"Column {column!r} of {where} holds a {type(value).__name__} in row {number + 1}: "
            "name a column whose cells are single texts or numbers."
        )
    if pd.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Labels in order: numbers as numbers, then words."""

    def key(label: str) -> tuple[bool, float, str]:
        try:
            return False, float(label), label
        except ValueError:
            return True, 0.0, label

    return sorted(set(labels), key=key)


def _records(rows: Rows, where: str) -> Iterable[Mapping[str, Any]]:
    if not isinstance(rows, pd.DataFrame):
        # Polars frames.
        to_dicts = getattr(rows, "to_dicts", None)
        return cast(Iterable[Mapping[str, Any]], to_dicts()) if callable(to_dicts) else rows
    refuse_doubled(rows.columns, where)
    return cast(list[dict[str, Any]], rows.to_dict("records"))


@dataclass(frozen=True)
class RecordSource:
    """Records in memory: one language, with or without splits."""

    records: Rows | Mapping[str, Rows] = field(repr=False)
    fields: Sequence[str]
    label: str
    id: str | None
    group: str | None
    where: str
    language: str
    _splits: dict[str, list[Example]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.records
        named = given if isinstance(given, Mapping) else {"train": given}
        splits: dict[str, list[Example]] = {}
        for name, rows in named.items():
            if name not in _SPLIT_NAMES:
                raise InputError(
                    f"{self.where} has a split {name!r}; use only {sorted(_SPLIT_NAMES)}."
                )
            where = self.where if len(named) == 1 else f"{self.where}/{name}"
            if _SPLIT_NAMES[name] in splits:
                raise InputError(f"{self.where} has two {_SPLIT_NAMES[name]} splits ({name}).")
            splits[_SPLIT_NAMES[name]] = to_examples(
                _records(rows, where),
                fields=self.fields,
                label=self.label,
                id=self.id,
                group=self.group,
                split=_SPLIT_NAMES[name],
                where=where,
            )
        object.__setattr__(self, "_splits", splits)

    def labels(self) -> list[str]:
        """All labels that occur, sorted."""
        return sorted_labels(e.label for examples in self._splits.values() for e in examples)

    @property
    def languages(self) -> Sequence[str]:
        """The one language."""
        return (self.language,)

    def resolve(self, language: str) -> str:
        """Accept only the one language."""
        if language == self.language:
            return language
        raise InputError(
            f"{self.where} has only the language {self.language!r}; make another task for "
            f"{language!r}, or use Task.from_file with {{language}} in the path."
        )

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Return the examples by split."""
        return self._splits


@dataclass(frozen=True)
class FileSource:
    """A file, several, or a folder with a file per split; ``{language}`` in the path is filled in.

    Several files are named by a pattern, such as ``data/{language}/*.csv.gz``.
    """

    path: str
    fields: Sequence[str]
    label: str
    id: str | None
    group: str | None
    language: str
    encoding: str | None = None

    @property
    def languages(self) -> Sequence[str]:
        """Unknown to us: whatever files are there."""
        return ()

    def resolve(self, language: str) -> str:
        """Accept any language if the path has a place for it."""
        if "{language}" not in self.path and language != self.language:
            raise InputError(
                f"The path {self.path} has only the language {self.language!r}: write "
                "{language} in its place to reach several, such as data/{language}.csv."
            )
        return language

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the file, or the files of the folder."""
        found: dict[str, list[Example]] = {}
        for name, files in self._files(language).items():
            rows = [row for file in files for row in read_rows(file, encoding=self.encoding)]
            # Of several files in as many folders, names of sounds are relative to the first.
            found[name] = to_examples(
                rows,
                fields=self.fields,
                label=self.label,
                id=self.id,
                group=self.group,
                split=name,
                where=str(files[0]) if len(files) == 1 else f"{files[0]} and others",
                folder=files[0].parent,
            )
        return found

    def _files(self, language: str) -> dict[str, list[Path]]:
        """The files of each split."""
        path = Path(self.path.replace("{language}", language)).expanduser()
        if path.is_dir():
            inside = sorted(path.iterdir())
        elif not path.exists() and any(sign in str(path) for sign in "*?["):
            inside = sorted(Path(name) for name in glob(str(path), recursive=True))
            if not inside:
                raise InputError(f"No file matches {path}.")
        else:
            return {"train": [path]}
        known = [f for f in inside if data_suffix(f) in SUFFIXES]
        splits = [f for f in known if stem(f) in _SPLIT_NAMES]
        if not splits and not path.is_dir():
            return {"train": known}
        files: dict[str, list[Path]] = {}
        for file in splits:
            name = _SPLIT_NAMES[stem(file)]
            if name in files:
                raise InputError(
                    f"The folder {file.parent} has two {name} files, {files[name][0].name} and "
                    f"{file.name}: remove one."
                )
            files[name] = [file]
        if "train" not in files:
            raise InputError(
                f"The folder {path} has no train file (train, valid and test as "
                f"{', '.join(SUFFIXES)})."
            )
        return files

    def labels(self, language: str) -> list[str]:
        """All labels that occur, sorted."""
        splits = self.splits(language)
        return sorted_labels(e.label for examples in splits.values() for e in examples)


def dataset_records(dataset: Any, label: str) -> Any:
    """Turn a ``Dataset`` or ``DatasetDict``, streamed or not, into what from_records takes.

    Labels that the data set withholds, such as those of a public test split, are ``None``.
    """
    import datasets

    if isinstance(dataset, Mapping):
        return {name: dataset_records(part, label) for name, part in dataset.items()}
    # As plain Python, whatever format was set.
    rows = list(dataset.with_format(None))
    feature = (dataset.features or {}).get(label)
    if not isinstance(feature, datasets.ClassLabel):
        return rows

    def name(number: int | None) -> str | None:
        return None if number is None or number < 0 else str(feature.int2str(int(number)))

    return [{**row, label: name(row[label])} for row in rows]


def name_of_files(path: Path) -> str:
    """A task's name from that of its file, or where only the language tells files apart, folder."""
    own = path.stem.replace("{language}", "").strip("-_. ")
    return own or path.parent.name.replace("{language}", "").strip("-_. ") or "task"
