"""Reading examples from records, files and ``datasets``."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd

from circuitlens.errors import InputError
from circuitlens.tasks.examples import Example

__all__ = [
    "FileSource",
    "RecordSource",
    "Rows",
    "dataset_records",
    "delimited_rows",
    "not_utf8",
    "read_rows",
    "to_examples",
]

_SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

Rows = Iterable[Mapping[str, Any]] | pd.DataFrame


def read_rows(
    path: Path, *, quoting: bool = True, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Read a CSV, TSV, JSONL or Parquet file as one dictionary a row.

    Args:
        path: the file; its suffix tells the format. Cells of CSV and TSV stay strings.
        quoting: whether a TSV or CSV file quotes cells.
        columns: names for a file without a header line.

    Raises:
        InputError: if the file is missing, of another kind, not in UTF-8, or cannot be parsed; if
            a CSV or TSV file has two columns of one name, or a line with more or fewer cells than
            the header (the line is named).
    """
    if not path.is_file():
        raise InputError(f"There is no data file {path}.")
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return list(delimited_rows(path, quoting=quoting, columns=columns))
        if suffix in (".jsonl", ".ndjson"):
            frame = pd.read_json(path, lines=True, dtype=False, encoding="utf-8-sig")
        elif suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            known = ", ".join(_SUFFIXES)
            raise InputError(f"{path} is no data file of a known kind: give one of {known}.")
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"The data file {path} could not be read ({error}).") from error
    return cast(list[dict[str, Any]], frame.to_dict("records"))


def not_utf8(path: Path) -> InputError:
    """The error that names a file in another encoding."""
    return InputError(f"The data file {path} is not in UTF-8: save it as UTF-8.")


def delimited_rows(
    path: Path, *, quoting: bool = True, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV or TSV file; arguments and errors as of :func:`read_rows`."""
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    # The csv module and not pandas, which takes surplus cells for an index and shifts the rest.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(
            file,
            fieldnames=columns,
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        )
        if reader.fieldnames is None:
            raise InputError(f"The data file {path} is empty.")
        # UTF-16 without a mark at its beginning decodes as UTF-8, with zeros between the letters.
        if any("\0" in name for name in reader.fieldnames):
            raise not_utf8(path)
        _refuse_doubled(reader.fieldnames, str(path))
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path} has {'more' if None in row else 'fewer'} cells in line "
                    f"{reader.line_num} than its header: put quotes round texts that hold "
                    f"{separator!r}."
                )
            yield dict(row)


def _refuse_doubled(columns: Iterable[Any], where: str) -> None:
    # Spreadsheets leave columns without a name at the end, which no field can mean.
    counts = Counter(name for name in columns if name != "")
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise InputError(
            f"{where} has {counts[doubled[0]]} columns named {doubled[0]!r}: rename or remove all "
            "but one."
        )


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
        InputError: naming a missing column and those that are there, or a row that is no mapping
            or has no id or no label.
    """
    examples: list[Example] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(
                f"Row {number + 1} of {where} is {row!r}, but must map column names to values, "
                f"such as {{{fields[0]!r}: …, {label!r}: …}}."
            )
        for column in (*fields, label, *(c for c in (id, group) if c)):
            if column not in row:
                raise InputError(f"{where} has no column {column!r}; its columns are {list(row)}.")
        examples.append(
            Example(
                id=_cell(row[id]) if id else f"{split}:{number}",
                fields={name: _cell(row[name]) for name in fields},
                label=_cell(row[label]),
                group=_cell(row[group]) if group else "",
            )
        )
        for needed, value in ((id, examples[-1].id), (label, examples[-1].label)):
            if not value:
                raise InputError(
                    f"{where} has no {needed!r} in row {number + 1}: every row needs one; fill it "
                    "in or remove the row."
                )
    return examples


def _cell(value: Any) -> str:
    """Text of a cell; what is missing (None, NaN, NA) is empty, not the word for it."""
    missing = pd.api.types.is_scalar(value) and pd.isna(value)
    return "" if missing else str(value).strip()


def _records(rows: Rows, where: str) -> Iterable[Mapping[str, Any]]:
    if not isinstance(rows, pd.DataFrame):
        return rows
    _refuse_doubled(rows.columns, where)
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
                    f"{self.where} has a split {name!r}; known are {sorted(_SPLIT_NAMES)}."
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
        path = Path(self.path.replace("{language}", language)).expanduser()
        files = {"train": path}
        if path.is_dir():
            found = [f for f in sorted(path.iterdir()) if f.suffix.lower() in _SUFFIXES]
            files = {}
            for file in (f for f in found if f.stem in _SPLIT_NAMES):
                name = _SPLIT_NAMES[file.stem]
                if name in files:
                    raise InputError(
                        f"The folder {path} has two {name} files, {files[name].name} and "
                        f"{file.name}: remove one."
                    )
                files[name] = file
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
    """Turn a ``Dataset`` or ``DatasetDict`` into what from_records takes.

    Labels that the data set withholds, such as those of a public test split, are ``None``.
    """
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        return {name: dataset_records(part, label) for name, part in dataset.items()}
    feature = dataset.features.get(label)
    if not isinstance(feature, datasets.ClassLabel):
        return list(dataset)

    def name(number: int | None) -> str | None:
        return None if number is None or number < 0 else str(feature.int2str(number))

    return [{**row, label: name(row[label])} for row in dataset]
