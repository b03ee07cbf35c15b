"""Reading examples from records, files and ``datasets``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd

from circuitlens.errors import InputError
from circuitlens.tasks.examples import Example

__all__ = [
    "FileSource",
    "RecordSource",
    "dataset_records",
    "read_rows",
    "read_table",
    "to_examples",
]

_SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_table(
    path: Path, *, quoting: bool = True, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read a CSV, TSV, JSONL or Parquet file; CSV and TSV cells stay strings.

    Args:
        path: the file; its suffix tells the format.
        quoting: whether a TSV or CSV file quotes cells.
        columns: names for a file without a header line.

    Raises:
        InputError: if the file is missing, of another kind, or cannot be parsed.
    """
    if not path.is_file():
        raise InputError(f"There is no data file {path}.")
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return pd.read_csv(
                path,
                sep="," if suffix == ".csv" else "\t",
                dtype=str,
                keep_default_na=False,
                quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
                names=None if columns is None else list(columns),
                header="infer" if columns is None else None,
            )
        if suffix in (".jsonl", ".ndjson"):
            return pd.read_json(path, lines=True, dtype=False)
        if suffix == ".parquet":
            return pd.read_parquet(path)
    except (ValueError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"The data file {path} could not be read ({error}).") from error
    raise InputError(f"{path} is no data file of a known kind: give one of {', '.join(_SUFFIXES)}.")


def read_rows(path: Path, **options: Any) -> list[dict[str, Any]]:
    """Read a table as one dictionary a row; see :func:`read_table`."""
    return cast(list[dict[str, Any]], read_table(path, **options).to_dict("records"))


def to_examples(
    rows: Iterable[Mapping[str, Any]],
    *,
    fields: Sequence[str],
    label: str,
    id: str | None,  # noqa: A002
    group: str | None,
    split: str,
    where: str,
) -> list[Example]:
    """Turn rows into examples; without an id column they are numbered within their split.

    Row numbers are shared by the languages of a parallel corpus, so its pools stay leak-safe.

    Raises:
        InputError: naming a missing column and those that are there.
    """
    examples: list[Example] = []
    for number, row in enumerate(rows):
        for column in (*fields, label, *(c for c in (id, group) if c)):
            if column not in row:
                raise InputError(f"{where} has no column {column!r}; its columns are {list(row)}.")
        examples.append(
            Example(
                id=str(row[id]) if id else f"{split}:{number}",
                fields={name: str(row[name]).strip() for name in fields},
                label=str(row[label]).strip(),
                group=str(row[group]) if group else "",
            )
        )
    return examples


@dataclass(frozen=True)
class RecordSource:
    """Records in memory: one language, with or without splits."""

    records: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
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
                    f"{self.where} has a split {name!r}; known are {sorted(_SPLIT_NAMES)}."
                )
            where = self.where if len(named) == 1 else f"{self.where}/{name}"
            splits[_SPLIT_NAMES[name]] = to_examples(
                rows,
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
        return sorted({e.label for examples in self._splits.values() for e in examples})

    @property
    def languages(self) -> Sequence[str]:
        """The one language."""
        return (self.language,)

    def resolve(self, language: str) -> str:
        """Accept only the one language."""
        if language == self.language:
            return language
        raise InputError(
            f"{self.where} holds only the language {self.language!r}; make a task of its own for "
            f"{language!r}, or use Task.from_file with {{language}} in the path."
        )

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Return the examples by split."""
        return self._splits


@dataclass(frozen=True)
class FileSource:
    """A file, or a folder with a file per split; ``{language}`` in the path is filled in."""

    path: str
    fields: Sequence[str]
    label: str
    id: str | None
    group: str | None
    language: str

    @property
    def languages(self) -> Sequence[str]:
        """Unknown to us: whatever files are there."""
        return ()

    def resolve(self, language: str) -> str:
        """Accept any language if the path has a place for it."""
        if "{language}" not in self.path and language != self.language:
            raise InputError(
                f"The path {self.path} holds only the language {self.language!r}: write "
                "{language} in its place to reach several, such as data/{language}.csv."
            )
        return language

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Read the file, or the files of the folder."""
        path = Path(self.path.format(language=language)).expanduser()
        files = {"train": path}
        if path.is_dir():
            found = [f for f in sorted(path.iterdir()) if f.suffix.lower() in _SUFFIXES]
            files = {_SPLIT_NAMES[f.stem]: f for f in found if f.stem in _SPLIT_NAMES}
            if "train" not in files:
                raise InputError(
                    f"The folder {path} has no train file (train, valid and test as "
                    f"{', '.join(_SUFFIXES)})."
                )
        return {
            name: to_examples(
                read_rows(file),
                fields=self.fields,
                label=self.label,
                id=self.id,
                group=self.group,
                split=name,
                where=str(file),
            )
            for name, file in files.items()
        }

    def labels(self, language: str) -> list[str]:
        """All labels that occur, sorted."""
        splits = self.splits(language)
        return sorted({e.label for examples in splits.values() for e in examples})


def dataset_records(dataset: Any, label: str) -> Any:
    """Turn a ``Dataset`` or ``DatasetDict`` into what from_records takes."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        return {name: dataset_records(part, label) for name, part in dataset.items()}
    feature = dataset.features.get(label)
    if not isinstance(feature, datasets.ClassLabel):
        return list(dataset)
    return [{**row, label: feature.int2str(row[label])} for row in dataset]
