"""The toy languages as a data set."""

from __future__ import annotations

from pathlib import Path

from circuitlens.errors import InputError
from circuitlens.tasks.sources.data_set import DataSet
from circuitlens.tasks.task import Source
from circuitlens.tasks.toy import TOY_PROMPT, ToyLanguages

__all__ = ["DATA_SET"]


def _open(folder: Path | None) -> Source:
    if folder is not None:
        raise InputError("The toy task makes its own data: leave data (--data) out.")
    return ToyLanguages()


DATA_SET = DataSet(
    name="toy",
    description="artificial languages, made by code",
    open=_open,
    language="source",
    prompt=TOY_PROMPT,
)
