"""Every strategy, several languages, three seeds: the comparisons that the README reports.

    python -m figures.compare nusax ../shared
    python -m figures.compare toy

Computes the cells that are neither in figures/NAME/ nor in runs/ yet, so an interrupted run goes
on, and writes the tables, and the scores and faithfulness of the circuit, to figures/NAME/.
Languages named at the end are the only ones that this process computes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import circuitlens as cl
from circuitlens.adapt import STRATEGIES
from circuitlens.experiments.cell_folder import CellFolder, Key
from circuitlens.tasks import toy

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
# Near to Indonesian (much of the vocabulary in common) and far.
NUSAX = ("javanese", "sundanese", "minangkabau", "acehnese", "toba_batak", "buginese")
# Hardly anything but training everything gets far in "far".
TOY = ("near", "far")


def nusax(shared: Path, languages: tuple[str, ...]) -> cl.Comparison:
    """Sentiment: from Indonesian to local languages, 8 of 32 heads."""
    task = cl.load_task("nusax", "indonesian", data=shared / "data" / "nusax")
    model = cl.load(shared / "models" / "nusa-tiny-ind")
    return _compare("nusax", model, task, languages or NUSAX, (3e-4, 1e-3, 3e-3), 10, 3)


def toy_languages(languages: tuple[str, ...]) -> cl.Comparison:
    """The built-in artificial languages, a quarter of the heads."""
    task = cl.load_task("toy")
    model = cl.finetune(toy.toy_model(), task, **toy.TOY_FINETUNE)
    return _compare("toy", model, task, languages or TOY, (1e-3, 3e-3, 1e-2), 20, 20)


def _compare(
    name: str,
    model: cl.HookedModel,
    task: cl.Task,
    languages: tuple[str, ...],
    rates: tuple[float, ...],
    epochs: int,
    patience: int,
) -> cl.Comparison:
    _restore(name)
    baseline = cl.label_balanced_mean(model, task)
    scores = cl.relevance(model, task, baseline)
    circuit = scores.top(0.25)
    kept = HERE / name / "faithfulness.safetensors"
    if not kept.is_file():
        scores.save(HERE / name / "scores.safetensors")
        circuit.save(HERE / name / "circuit.json")
        cl.faithfulness(model, task, scores, baseline).save(kept)
    # auto takes seven times as long as the others, so it has one seed.
    for strategies, seeds in ((tuple(STRATEGIES), SEEDS), (("auto",), SEEDS[:1])):
        cl.compare(
            model,
            circuit,
            task,
            languages,
            strategies=strategies,
            seeds=seeds,
            scores=scores,
            out=HERE.parent / "runs" / name,
            learning_rates=rates,
            epochs=epochs,
            patience=patience,
            accumulation=2,
        )
    return cl.Comparison.load(HERE.parent / "runs" / name)


def _restore(name: str) -> None:
    """Put the cells of the tables here into runs/, so that only what they lack is computed."""
    here, there = HERE / name, HERE.parent / "runs" / name
    if there.exists() or not (here / "grid.json").is_file():
        return
    there.mkdir(parents=True)
    shutil.copyfile(here / "grid.json", there / "grid.json")
    folder = CellFolder.open(there, {}, {})
    for cell in cl.Comparison.load(here).cells:
        folder.write(Key(cell["target_language"], cell["strategy"], cell["seed"]), cell)


def main(name: str, *rest: str) -> None:
    """Compute and write one of the comparisons."""
    # Side by side with other work one thread is faster than two, and sums are the same everywhere.
    torch.set_num_threads(1)
    if name == "nusax":
        found = nusax(Path(rest[0] if rest else "../shared"), rest[1:])
    else:
        found = toy_languages(rest)
    found.save(HERE / name)
    shutil.copyfile(HERE.parent / "runs" / name / "grid.json", HERE / name / "grid.json")
    found.pairs().to_csv(HERE / name / "pairs.csv", index=False)
    found.regret().to_csv(HERE / name / "regret.csv", index=False)
    print(found.summary().to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main(*sys.argv[1:])
