"""Reading rows from files as people have them: other separators, encodings, compressed, several.

Cells of text files stay strings, as written. Anything guessed (a separator, an encoding that a mark
names) is logged; anything that cannot be known is an error with the remedy.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import Any, TextIO, cast
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812

import fsspec  # type: ignore[import-untyped]

from circuitlens.errors import InputError

__all__ = [
    "COMPRESSED",
    "SUFFIXES",
    "data_suffix",
    "delimited_rows",
    "json_rows",
    "not_decoded",
    "read_rows",
    "refuse_doubled",
    "stem",
]

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
_DELIMITED = (".csv", ".tsv")
_OTHERS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
# utf-8-sig reads files with and without a mark.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def data_suffix(path: Path) -> str:
    """What kind of file it is, below a compression: ``.csv`` of ``data.csv.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def stem(path: Path) -> str:
    """The name without the suffixes of kind and compression."""
    return path.name.removesuffix(path.suffix).removesuffix(data_suffix(path))


def read_rows(
    path: Path,
    *,
    quoting: bool = True,
    columns: Sequence[str] | None = None,
    encoding: str | None = None,
) -> list[dict[str, Any]]:
    """Read a CSV, TSV, JSONL or Parquet file, compressed or not, as one dictionary per row.

    Args:
        path: the file; its suffix tells the format. Cells of CSV and TSV stay strings.
        quoting: whether a TSV or CSV file quotes cells.
        columns: names for a file without a header line.
        encoding: of a text file; by default UTF-8, or what its byte order mark says.

    Raises:
        InputError: if the file is missing, of another kind, in another encoding, or cannot be
            parsed; if a CSV or TSV file has two columns of one name, a line with more or fewer
            cells than the header, or a quote that is never closed (the line is named).
    """
    if not path.is_file():
        raise InputError(f"There is no data file {path}.")
    suffix = data_suffix(path)
    try:
        if suffix in _DELIMITED:
            options: dict[str, Any] = {"quoting": quoting, "columns": columns}
            return list(delimited_rows(path, encoding=encoding, **options))
        if suffix in (".jsonl", ".ndjson"):
            return list(json_rows(path, encoding=encoding))
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            with fsspec.open(str(path), "rb", compression="infer") as file:
                return cast(list[dict[str, Any]], pq.read_table(file).to_pylist())
    except (ValueError, OSError, EOFError, LZMAError, BadZipFile, ZlibError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The data file {path} could not be read ({error}).") from error
    known = ", ".join(SUFFIXES)
    raise InputError(
        f"{path} is not a known kind of data file: give one of {known}, or one of these compressed "
        f"({', '.join(COMPRESSED)})."
    )


def not_decoded(path: Path, encoding: str | None) -> InputError:
    """The error for a file in another encoding."""
    if encoding is None:
        return InputError(
            f"The data file {path} is not in UTF-8: save it as UTF-8, or name its encoding, such "
            "as encoding='cp1252' (--encoding cp1252)."
        )
    return InputError(f"The data file {path} is not in {encoding}: check encoding (--encoding).")


@contextmanager
def _opened(path: Path, encoding: str | None) -> Iterator[TextIO]:
    """A text file, decompressed and decoded.

    Raises:
        InputError: if it is in another encoding.
    """
    compression: Any = "infer"
    with fsspec.open(str(path), "rb", compression=compression) as file:
        mark = file.read(4)
    known = next((name for start, name in _MARKS.items() if mark.startswith(start)), None)
    if encoding is None and known is not None:
        logger.info("%s is read as %s, as its byte order mark says.", path, known)
    chosen = encoding or known or "utf-8-sig"
    try:
        with fsspec.open(
            str(path), "rt", compression=compression, encoding=chosen, newline=""
        ) as file:
            yield file
    except UnicodeError as error:
        raise not_decoded(path, encoding) from error
    except LookupError as error:
        raise InputError(f"There is no encoding {encoding!r}: check --encoding.") from error


def json_rows(path: Path, *, encoding: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; whole numbers are read as written, however long.

    Raises:
        InputError: naming a line that is not a JSON object.
    """
    with _opened(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} could not be read as JSON ({error}).") from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object: give one with the texts by name.")
            yield row


def delimited_rows(
    path: Path,
    *,
    quoting: bool = True,
    columns: Sequence[str] | None = None,
    encoding: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV or TSV file; arguments and errors as of :func:`read_rows`."""
    # A cell may be as long as it likes.
    csv.field_size_limit(sys.maxsize)
    separator = "," if data_suffix(path) == ".csv" else "\t"
    with _opened(path, encoding) as file:
        first = file.readline()
        if not first:
            raise InputError(f"The data file {path} is empty.")
        # UTF-16 without a mark at its beginning decodes as UTF-8, with zeros between the letters.
        if "\0" in first:
            raise not_decoded(path, encoding)
        bare = first.rstrip("\r\n")
        if bare.lower().startswith("sep=") and len(bare) == 5:
            # Excel's line.
            separator, first = bare[-1], ""
        elif columns is None:
            separator = _sniffed(first, separator, path)
        reader = csv.DictReader(
            _lines(first, file),
            fieldnames=columns,
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
            strict=True,
        )
        begin = 0
        try:
            refuse_doubled(reader.fieldnames or (), str(path))
            begin = reader.line_num
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path} has {'more' if None in row else 'fewer'} cells in line "
                        f"{reader.line_num} than its header: put quotes around texts with "
                        f"{separator!r}."
                    )
                begin = reader.line_num
                yield dict(row)
        except csv.Error as error:
            where = f"line {begin + 1} of {path}"
            if "end of data" in str(error):
                raise InputError(
                    f"A quote in {where} is never closed: close it, or double quotes that belong "
                    'to the text ("").'
                ) from error
            raise InputError(
                f"{where} could not be read ({error}): inside a quoted text, quotes are doubled "
                '("").'
            ) from error


def _lines(first: str, rest: Iterable[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _sniffed(header: str, usual: str, path: Path) -> str:
    """The separator of a header line: another, if the usual one does not occur in it."""
    if usual in header:
        return usual
    found = max(_OTHERS, key=header.count)
    if not header.count(found):
        return usual
    logger.info("The columns of %s are separated by %s.", path, _OTHERS[found])
    return found


def refuse_doubled(columns: Iterable[Any], where: str) -> None:
    """Reject two columns of one name.

    Raises:
        InputError: naming it.
    """
    # Spreadsheets leave columns without a name at the end, which no field can mean.
    counts: Mapping[Any, int] = Counter(name for name in columns if name != "")
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise InputError(
            f"{where} has {counts[doubled[0]]} columns named {doubled[0]!r}: rename or remove all "
            "but one."
        )
