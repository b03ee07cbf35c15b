"""Data sets known by name, a module each: its ``DATA_SET`` is all that has to be written.

Folders have the layout of the data sets' own repositories; without a folder the hub is asked.
Lists of known faults next to the data are honoured, and the log says how many rows they cost.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from circuitlens.catalogue import check_task
from circuitlens.errors import InputError
from circuitlens.tasks.sources.data_set import DataSet
from circuitlens.tasks.task import COLUMNS, FILE_OPTIONS, OPTIONS, Task, check_options

__all__ = ["DataSet", "data_sets", "load_task"]


@cache
def data_sets() -> dict[str, DataSet]:
    """Return the data sets that :func:`circuitlens.load_task` knows, by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    sets = [module.DATA_SET for module in modules if hasattr(module, "DATA_SET")]
    return {found.name: found for found in sorted(sets, key=lambda found: found.name)}


def load_task(
    name: str, language: str | None = None, *, data: str | Path | None = None, **options: Any
) -> Task:
    """Load a task by the name of its data set, or from a file.

    Args:
        name: one of :func:`circuitlens.tasks.data_sets`, such as ``nusax``, or the path of a CSV,
            TSV, JSONL or Parquet file (see :meth:`Task.from_file`).
        language: a name or a code; the default is the data set's usual source language.
        data: local folder of the data set; without it, all but SmSA, AmericasNLI and those that
            code makes (toy, ioi, greater-than) come from the hub.
        options: ``template``, ``labels``, ``seed``, ``share_a``, ``max_text_tokens``,
            ``tokenizer`` (checks the label words at once); for a file, also its columns, as
            ``label``, ``id`` and ``group``, and its ``encoding``.

    Raises:
        InputError: for an unknown task, language or option (the known ones are listed), a missing
            folder or file, or data that cannot be used.
    """
    if not isinstance(name, str | Path):
        raise InputError(
            "load_task: name must be that of a data set or of a file, not a "
            f"{type(name).__name__}: for data in memory use cl.Task.from_records(…) or "
            "cl.Task.from_dataset(…)."
        )
    known = data_sets()
    name = str(name)
    check_task(name, known)
    if name not in known:
        if data is not None:
            raise InputError(f"{name} is a data file itself: leave data (--data) out.")
        check_options(options, (*FILE_OPTIONS, *COLUMNS, *OPTIONS), name)
        return Task.from_file(name, language=language or "unnamed", **options)
    check_options(options, OPTIONS, name)
    chosen = known[name]
    source = chosen.open(None if data is None else Path(data))
    language = source.resolve(language or chosen.language)
    return Task.from_source(
        source,
        language,
        name=name,
        **{**chosen.prompt, **chosen.prompts.get(language, {}), **options},
    )
