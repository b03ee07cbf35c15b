"""Rows of a file one after the other, and tables that grow: for files larger than memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from circuitlens.errors import InputError
from circuitlens.tasks.reading import SUFFIXES, data_suffix, delimited_rows, json_rows
from circuitlens.utils.storage import replacing

__all__ = ["Table", "chunks", "stream_rows"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, TSV, JSONL or Parquet file.

    Raises:
        InputError: for another kind of file, one that is missing, or a row that cannot be read,
            which is named.
    """
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path} is not a known kind of text file: give .csv, .tsv, .jsonl or .parquet."
        )
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    elif suffix in _DELIMITERS:
        yield from delimited_rows(path)
    else:
        yield from json_rows(path)


def chunks(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of rows, all but the last of this size."""
    while chunk := list(islice(rows, size)):
        yield chunk


class Table:
    """A CSV, TSV or JSONL file that is written row by row, and is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Choose the format by the suffix.

        Raises:
            InputError: for another suffix.
        """
        self.path = path
        self._suffix = path.suffix.lower()
        if self._suffix not in (*_DELIMITERS, *_LINES):
            raise InputError(f"{path} must end in .csv, .tsv or .jsonl: rename it (--out).")
        self._columns: Sequence[str] | None = None
        self._replacing = replacing(path)

    def __enter__(self) -> Table:
        temporary = self._replacing.__enter__()
        self._file = temporary.open("w", encoding="utf-8", newline="")
        return self

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; columns are those of the first one."""
        if self._suffix in _LINES:
            for row in rows:
                self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            return
        writer = csv.DictWriter(
            self._file,
            self._columns or list(rows[0]),
            delimiter=_DELIMITERS[self._suffix],
            extrasaction="ignore",
        )
        if self._columns is None:
            self._columns = list(rows[0])
            writer.writeheader()
        writer.writerows(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._replacing.__exit__(kind, error, trace)
