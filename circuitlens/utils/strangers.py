"""Names that others chose, where they could act: on terminals, in spreadsheets and in Markdown.

HTML is escaped where it is made (templates, plotly), and file names by
:func:`circuitlens.utils.storage.safe_name`.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "as_code",
    "as_markdown",
    "for_spreadsheets",
    "on_one_line",
    "plain_log",
    "printable",
]

# They turn round what stands behind them.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~$!])")
# A spreadsheet takes a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: object) -> str:
    """Write a text so that a terminal shows it and does nothing else."""
    return "".join(_shown(letter) for letter in str(text))


def _shown(letter: str) -> str:
    if letter in "\n\t" or not (unicodedata.category(letter) == "Cc" or letter in _TURNING):
        return letter
    return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"


def on_one_line(text: object) -> str:
    """The same without line breaks."""
    return printable(" ".join(str(text).split()))


def plain_log() -> logging.Handler:
    """Log lines on standard error, without anything that a terminal would act on."""

    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(Plain("%(message)s"))
    return handler


def as_markdown(text: object) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    return _MARKS.sub(r"\\\1", on_one_line(text))


def as_code(text: object) -> str:
    """Write a text as code of Markdown, whatever backticks it has."""
    line = on_one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def for_spreadsheets(frame: pd.DataFrame) -> pd.DataFrame:
    """A table in which no text is a formula: such a one gets an apostrophe in front."""

    def cell(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and _is_formula(value) else value

    return frame.map(cell).rename(columns=cell)


def _is_formula(text: str) -> bool:
    if not text.startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
