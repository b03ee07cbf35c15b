"""The folder of a comparison: every finished cell is its own file.

DIR/grid.json                                  what all cells depend on
DIR/cells/LANGUAGE/STRATEGY/seed-N.json        the numbers of a finished transfer
DIR/cells/LANGUAGE/STRATEGY/seed-N.error.json  why a transfer failed
DIR/cells/LANGUAGE/STRATEGY/seed-N.training/   how far an unfinished one has come
DIR/cells/LANGUAGE/STRATEGY/.seed-N.lock       held by the process that runs the cell
DIR/table.csv, summary.csv, comparison.json    of all finished cells

A cell that is there is never computed again; the tables are rewritten at the end of every call.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from circuitlens.adapt.strategies import place_of
from circuitlens.errors import InputError
from circuitlens.experiments.comparison import Comparison
from circuitlens.utils.storage import read_json, safe_name, write_json

__all__ = ["CellFolder", "Key"]

_GRID = "circuitlens.grid/1"
_CELL = "circuitlens.cell/1"
_ERROR = "circuitlens.cell-error/1"


class Key(NamedTuple):
    """Which cell of the grid."""

    language: str
    strategy: str
    seed: int

    def __str__(self) -> str:
        return f"{self.language}, {self.strategy}, seed {self.seed}"


class CellFolder:
    """Cells on disk. Every file there is complete: it was written elsewhere and renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls,
        path: Path,
        settings: Mapping[str, Any],
        languages: Mapping[str, str],
        *,
        writes: bool = True,
    ) -> CellFolder:
        """Start a comparison in a folder, or continue the one that is there.

        Args:
            path: the folder.
            settings: what every cell depends on, as JSON would give it back.
            languages: fingerprints of the tasks in the target languages; new ones may come.
            writes: whether this process keeps the index; of several that train together, one does.

        Raises:
            InputError: if the comparison there has other settings or the folder holds anything
                else.
        """
        if not writes:
            return cls(path)
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / ".grid.lock"):
            return cls._indexed(path, settings, languages)

    @classmethod
    def _indexed(
        cls, path: Path, settings: Mapping[str, Any], languages: Mapping[str, str]
    ) -> CellFolder:
        file = path / "grid.json"
        if not file.is_file():
            # Hidden files are what a killed process left of an unfinished one.
            if path.exists() and any(not p.name.startswith(".") for p in path.iterdir()):
                raise InputError(
                    f"The folder {path} exists, is not empty and contains no comparison: choose "
                    "another out."
                )
            write_json(file, _GRID, {"settings": settings, "languages": languages})
            return cls(path)
        stored = read_json(file, _GRID)
        # What is null (scores that were not given) no finished cell depends on.
        given = {name: value for name, value in settings.items() if value is not None}
        for kind, old, new in (
            ("", stored["settings"], given),
            ("data of ", stored["languages"], languages),
        ):
            for name, value in new.items():
                if old.get(name) not in (None, value):
                    raise InputError(
                        f"{path} contains a comparison with other settings ({kind}{name} was "
                        f"{old[name]!r}, now {value!r}): choose another out, keep the old "
                        "settings, or remove that folder."
                    )
        grown = {
            "settings": stored["settings"] | given,
            "languages": stored["languages"] | dict(languages),
        }
        if grown != stored:
            write_json(file, _GRID, grown)
        return cls(path)

    def _file(self, key: Key, kind: str = "") -> Path:
        parts = map(safe_name, key[:2])
        return self.path.joinpath("cells", *parts, f"seed-{key.seed}{kind}.json")

    def read(self, key: Key) -> dict[str, Any] | None:
        """Return a finished cell, or ``None``."""
        file = self._file(key)
        return read_json(file, _CELL) if file.is_file() else None

    def write(self, key: Key, cell: Mapping[str, Any]) -> None:
        """Write a finished cell; an earlier failure is forgotten."""
        write_json(self._file(key), _CELL, cell, compact=True, sealed=True)
        self._file(key, ".error").unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints(key), ignore_errors=True)

    def lock(self, key: Key) -> FileLock:
        """A lock that one process holds while it works on a cell."""
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(file.with_name(f".{file.stem}.lock"))

    def checkpoints(self, key: Key) -> Path:
        """Folder of the trainings of a cell that is not finished."""
        return self._file(key, ".training").with_suffix("")

    def fail(self, key: Key, error: Mapping[str, Any]) -> None:
        """Write why a cell failed."""
        write_json(self._file(key, ".error"), _ERROR, error, sealed=True)

    def comparison(self) -> Comparison:
        """Return all cells of the folder, whichever call they came from."""
        cells: dict[Key, dict[str, Any]] = {}
        errors: dict[Key, dict[str, Any]] = {}
        for file in (self.path / "cells").glob("*/*/seed-*.json"):
            if file.name.endswith(".error.json"):
                error = read_json(file, _ERROR)
                errors[Key(error["language"], error["strategy"], error["seed"])] = error
            else:
                cell = read_json(file, _CELL)
                cells[Key(cell["target_language"], cell["strategy"], cell["seed"])] = cell

        # Read again: another process may have added languages.
        languages = list(read_json(self.path / "grid.json", _GRID)["languages"])

        def place(key: Key) -> tuple[int, tuple[int, str], Key]:
            known = key.language in languages
            where = languages.index(key.language) if known else len(languages)
            return where, place_of(key.strategy), key

        return Comparison(
            tuple(cells[key] for key in sorted(cells, key=place)),
            # A process that was killed in between leaves an old error next to the cell.
            tuple(errors[key] for key in sorted(errors.keys() - cells.keys(), key=place)),
        )
