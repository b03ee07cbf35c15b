"""Kill every stage at random moments, repeat the call, and compare with one that nobody disturbed.

    python -m benchmarks.faults [--kills 50] [--seed 0] [--stage transfer …]

One line of JSON per stage: kills, how many ended with equal numbers, and what was left behind. A
stage runs in a process of its own, which gets SIGKILL after a random share of the time that it
takes undisturbed, up to twice before it may end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import circuitlens as cl
from circuitlens.adapt.options import TRANSFER
from circuitlens.run_folder import RunFolder
from circuitlens.run_settings import RunSettings
from circuitlens.tasks import toy
from circuitlens.view import write_figures

_TRAINING = {"epochs": 3, "batch_size": 16, "quiet": True}


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign and print a line per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", nargs="+", choices=_STAGES, default=list(_STAGES))
    asked = parser.parse_args(arguments)
    # Forks, so that no process has to import everything: threads would not survive that.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        parts = Path(scratch) / "parts"
        _forked(_prepare, parts)
        for name in asked.stage:
            print(json.dumps(_campaign(name, parts, asked.kills, asked.seed)), flush=True)


def _campaign(name: str, parts: Path, kills: int, seed: int) -> dict[str, Any]:
    chance = random.Random(f"{name} {seed}")
    stage = _STAGES[name]
    whole, seconds = _undisturbed(stage, parts)
    equal = done = late = 0
    different: list[str] = []
    left: set[str] = set()
    while done < kills:
        folder = parts.parent / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(parts, folder)
        here = 0
        for _ in range(chance.choice((1, 2))):
            if _forked(stage, folder, kill_after=chance.uniform(0, seconds)):
                late += 1
                break
            here += 1
        _forked(stage, folder)
        if not here:
            continue
        done += here
        if (found := (folder / "numbers").read_text()) == whole:
            equal += here
        else:
            different.append(found[:12])
        left |= {p.name.split(".json.")[0] for p in folder.rglob(".*") if p.is_file()}
    return {
        "benchmark": "faults",
        "stage": name,
        "kills": done,
        "equal": equal,
        "ended_before_the_kill": late,
        "seconds_undisturbed": round(seconds, 2),
        "left_behind": sorted(left),
        "seed": seed,
        "torch": torch.__version__,
    }


def _undisturbed(stage: Callable[[Path], str], parts: Path) -> tuple[str, float]:
    folder = parts.parent / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(parts, folder)
    start = time.perf_counter()
    _forked(stage, folder)
    return (folder / "numbers").read_text(), time.perf_counter() - start


def _forked(
    stage: Callable[[Path], str | None], folder: Path, kill_after: float | None = None
) -> bool:
    """Run a stage in a process of its own; whether it ended by itself.

    Raises:
        RuntimeError: if it failed.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(stage, folder))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{stage.__name__} ended with {process.exitcode}")
    return process.exitcode == 0


def _child(stage: Callable[[Path], str | None], folder: Path) -> None:
    try:
        found = stage(folder)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    if found is not None:
        (folder / "numbers").write_text(found)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# -- stages ---------------------------------------------------------------------------------


def _prepare(folder: Path) -> None:
    """A model, data and a finished run that all stages begin with."""
    folder.mkdir()
    model = toy.toy_model(n_layers=2)
    options = {**toy.TOY_FINETUNE, "epochs": 10, "quiet": True}
    cl.finetune(model, cl.load_task("toy"), **options).save(folder / "model")
    for language in ("source", "near"):
        examples = cl.load_task("toy", language)["pool_a"][:240]
        rows = [{"id": e.id, "text": e.fields["text"], "label": e.label} for e in examples]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    run = RunFolder.create(folder / "finished", _settings(folder), quiet=True)
    run.run_all()


def _settings(folder: Path) -> RunSettings:
    return RunSettings(
        model=str(folder.parent / "parts" / "model"),
        task=str(folder.parent / "parts" / "{language}.jsonl"),
        source="source",
        targets=("near",),
        template="{text} ->",
        size=4,
        n_random=3,
        strategies=("circuit", "norms"),
        learning_rates=(1e-3,),
        training=TRANSFER.updated({"epochs": 1}),
        replay=(0.5,),
        competence="never",
    )


def _parts(folder: Path) -> tuple[cl.HookedModel, cl.Circuit, cl.Task]:
    settings = _settings(folder)
    task = settings.open_task()
    return settings.open_model(task), cl.Circuit.load(folder / "finished" / "circuit.json"), task


def _finetune(folder: Path) -> str:
    model, _, task = _parts(folder)
    options = {**_TRAINING, "learning_rate": 1e-3, "epochs": 6}
    trained = cl.finetune(model, task, checkpoints=folder / "state", **options)
    return _digest(trained.fingerprint())


def _discovery(folder: Path) -> str:
    run = RunFolder.create(folder / "run", _settings(folder), quiet=True)
    curve = run.curve.to_frame().to_csv()
    roles = run.roles.to_frame().to_csv()
    effects = run.effects.to_frame(run.scores).to_csv()
    run.write_record()
    return _digest(run.scores.to_frame().to_csv(), run.circuit.to_dict(), curve, roles, effects)


def _transfer(folder: Path) -> str:
    model, circuit, task = _parts(folder)
    options = {**_TRAINING, "learning_rates": [1e-3, 3e-3], "accumulation": 2}
    result = cl.transfer(
        model,
        circuit,
        task.to("near"),
        replay=[0.0, 1.0],
        keep_source=0.02,
        checkpoints=folder / "state",
        **options,
    )
    result.save(folder / "result")
    return _digest(_same(cl.TransferResult.load(folder / "result").to_dict()), _weights(result))


def _weights(result: cl.TransferResult) -> str:
    assert result.model is not None
    return result.model.fingerprint()


def _same(numbers: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on how fast the machine was."""
    return {k: v for k, v in numbers.items() if k not in ("seconds", "peak_mib", "provenance")}


def _compare(folder: Path) -> str:
    model, circuit, task = _parts(folder)
    found = cl.compare(
        model,
        circuit,
        task,
        ["near"],
        strategies=["circuit", "lora"],
        seeds=[0, 1],
        learning_rates=[1e-3],
        out=folder / "grid",
        **_TRAINING,
    )
    return _digest([_same(cell) for cell in found.cells])


def _redo(folder: Path) -> str:
    """Another circuit, then everything again that came of the old one."""
    run = RunFolder.open(folder / "finished", quiet=True)
    if run.settings.size != 2:
        run.discover_again({"size": 2})
    curve = run.curve.to_frame().to_csv()
    results = [_same(run.transfer("near", name).to_dict()) for name in run.settings.strategies]
    run.report()
    run.write_record()
    kept = sorted(str(p.relative_to(run.path)) for p in run.path.glob("replaced-1/*"))
    return _digest(run.circuit.to_dict(), curve, results, kept, len(run.effects.heads))


def _report(folder: Path) -> str:
    page = RunFolder.open(folder / "finished", quiet=True).report()
    content = page.read_text(encoding="utf-8")
    assert content.rstrip().endswith("</html>")
    return _digest(len(content.split("<section")))


def _figures(folder: Path) -> str:
    files = write_figures(folder / "finished", folder / "figures", ["html"])
    tables = [f.read_text(encoding="utf-8") for f in sorted(files) if f.suffix == ".csv"]
    return _digest(sorted(f.name for f in files), tables)


_STAGES: dict[str, Callable[[Path], str]] = {
    "finetune": _finetune,
    "discovery": _discovery,
    "transfer": _transfer,
    "compare": _compare,
    "redo": _redo,
    "report": _report,
    "figures": _figures,
}


if __name__ == "__main__":
    main()
