"""What a data set known by name is, and what the readers of several share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuitlens.errors import InputError
from circuitlens.tasks.task import Source

__all__ = [
    "CONVERTED",
    "INFERENCE",
    "SENTIMENT",
    "DataSet",
    "from_hub",
    "needed",
    "open_folder",
    "parquet_folder",
    "pick",
    "refuse_foreign",
]

# Prompts and answer words that several data sets share.
SENTIMENT = {
    "template": "{text} sentimen:",
    "labels": {"negative": " negatif", "neutral": " netral", "positive": " positif"},
}
INFERENCE = {
    "template": "{premise} Question: {hypothesis} True, False or Neither? Answer:",
    "labels": {"entailment": " True", "neutral": " Neither", "contradiction": " False"},
}


@dataclass(frozen=True)
class DataSet:
    """A data set that :func:`circuitlens.load_task` knows by name.

    Attributes:
        name: the name.
        description: a line for help texts and lists.
        open: makes the source from a local folder; ``None`` stands for the hub.
        language: the usual source language.
        prompt: ``template`` and ``labels`` of the task, or what makes them.
        prompts: what differs where a language is loaded by its name, by the source's name of
            the language. :meth:`Task.to` keeps the prompt of the language that it starts from.
    """

    name: str
    description: str
    open: Callable[[Path | None], Source]
    language: str
    prompt: Mapping[str, Any]
    prompts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def pick(language: str, known: Mapping[str, str] | Sequence[str], what: str) -> str:
    """Resolve a language name or code; the error lists what there is."""
    key = language.strip().lower().replace(" ", "_")
    names = dict(known) if isinstance(known, Mapping) else {name: name for name in known}
    if key in names:
        return names[key]
    raise InputError(
        f"{what} has no language {language!r}; it has {', '.join(sorted(set(names.values())))}."
    )


def refuse_foreign(languages: Sequence[str], folder: Path, what: str, holds: str) -> None:
    """For a folder that is not the right one, say what it should contain."""
    if not languages:
        raise InputError(
            f"The data folder {folder} contains no language of {what}; it should contain {holds}."
        )


def open_folder(path: str | Path, *, holds: str) -> Path:
    """Return a data folder.

    Raises:
        InputError: if it does not exist, saying what it should contain.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"The data folder {folder} does not exist; it should contain {holds}.")
    return folder


# The hub keeps a converted copy of script-based data sets, which `datasets` no longer runs.
CONVERTED = "refs/convert/parquet"


def from_hub(repository: str, configuration: str, *, revision: str | None = None) -> Any:
    """Load a configuration of a hub data set; a failed download says what to do.

    Args:
        repository: on the hub.
        configuration: its name; that of a folder where ``revision`` is given.
        revision: such as :data:`CONVERTED`.

    Raises:
        InputError: if it cannot be loaded.
    """
    import datasets

    # The converted copy does not say which configurations it has, and `datasets` knows no name of
    # them: they are folders.
    place: dict[str, str] = (
        {"name": configuration}
        if revision is None
        else {"data_dir": configuration, "revision": revision}
    )
    try:
        return datasets.load_dataset(repository, **place)
    except Exception as error:
        raise InputError(
            f"{repository} ({configuration}) could not be loaded from the hub "
            f"({type(error).__name__}); without network, give a local folder: data=… or --data."
        ) from error


def parquet_folder(
    folder: Path,
    names: Sequence[str] = ("train", "validation", "test"),
    optional: Sequence[str] = (),
) -> Any:
    """Open the ``<split>*.parquet`` or ``<split>/*.parquet`` files of a folder, as on the hub.

    Args:
        folder: where they are.
        names: the splits.
        optional: those that may be missing.

    Raises:
        InputError: if the folder or a split is missing.
    """
    import datasets

    open_folder(folder, holds=f"{names[0]}*.parquet and so on")
    files = {
        name: sorted(
            str(path)
            for form in (f"{name}*.parquet", f"{name}/*.parquet")
            for path in folder.glob(form)
        )
        for name in names
    }
    if missing := [name for name in names if not files[name] and name not in optional]:
        raise InputError(f"The data folder {folder} has no {missing[0]}*.parquet file.")
    there = {name: paths for name, paths in files.items() if paths}
    return datasets.load_dataset("parquet", data_files=there)


def needed(name: str, data: Path | None) -> Path:
    """Return the folder of a data set that is read from a local folder only.

    Raises:
        InputError: if there is none.
    """
    if data is None:
        raise InputError(f"{name} is read from a local folder only: give data=… (--data).")
    return data
