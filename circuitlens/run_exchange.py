"""Another circuit in the folder of a run, in one step that a kill cannot leave half done.

The new scores and circuit are written to a separate folder, which is then named ``.redo``. From
there on the exchange can only be completed: whoever opens the run next does what is left of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from circuitlens.circuit import Circuit
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.utils.room import writing_to
from circuitlens.utils.storage import RUN_SCHEMA, read_json, write_json

__all__ = ["complete_exchange", "exchange"]

_SCHEMA = "circuitlens.redo/1"
_NEW = ("scores.safetensors", "circuit.json")
# What follows from a circuit.
_OUTCOMES = (
    *("effects.safetensors", "roles.json", "faithfulness.safetensors"),
    *("report.html", "figures", "transfers", "compare"),
)


def exchange(
    run: Path,
    record: Mapping[str, Any],
    scores: HeadScores,
    circuit: Circuit,
    *,
    backup: bool,
) -> Path | None:
    """Replace the old scores and circuit, and all that is based on them, by new ones.

    Args:
        run: folder of the run.
        record: content of ``run.json`` from now on.
        scores, circuit: the new ones.
        backup: keep the old results, in a folder of the run; otherwise they are removed.

    Returns:
        The folder with the old results, if they are kept.
    """
    coming, prepared = run / ".redo", run / ".redo-unfinished"
    shutil.rmtree(prepared, ignore_errors=True)
    place = next(name for n in count(1) if not (run / (name := f"replaced-{n}")).exists())
    scores.save(prepared / "scores.safetensors")
    circuit.save(prepared / "circuit.json")
    content = {"record": dict(record), "backup": place if backup else None}
    write_json(prepared / "redo.json", _SCHEMA, content)
    with writing_to(run):
        prepared.rename(coming)
    complete_exchange(run)
    return run / place if backup else None


def complete_exchange(run: Path) -> None:
    """Complete an exchange, if one was started in the folder of a run."""
    coming = run / ".redo"
    if not (coming / "redo.json").is_file():
        shutil.rmtree(coming, ignore_errors=True)
        return
    content = read_json(coming / "redo.json", _SCHEMA)
    backup = None if content["backup"] is None else run / content["backup"]
    with writing_to(run):
        if backup is not None and not (backup / "run.json").exists():
            backup.mkdir(exist_ok=True)
            shutil.copy2(run / "run.json", backup / ".run.json")
            os.replace(backup / ".run.json", backup / "run.json")
        for name in _OUTCOMES:
            _clear(run / name, backup)
        for name in _NEW:
            if (coming / name).exists():
                _clear(run / name, backup)
                os.replace(coming / name, run / name)
    write_json(run / "run.json", RUN_SCHEMA, content["record"])
    # What says that something is left goes first.
    (coming / "redo.json").unlink()
    shutil.rmtree(coming, ignore_errors=True)


def _clear(old: Path, backup: Path | None) -> None:
    if not old.exists():
        return
    if backup is not None:
        os.replace(old, backup / old.name)
    elif old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()
