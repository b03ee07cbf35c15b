"""Every strategy, several languages, three seeds: the comparisons that the README reports.

    python -m figures.compare nusax ../shared
    python -m figures.compare keep-source ../shared
    python -m figures.compare toy
    python -m figures.compare minilm ../shared path/to/all-MiniLM-L6-v2
    python -m figures.compare minilm-keep-source ../shared path/to/all-MiniLM-L6-v2

Computes the cells that are neither in figures/NAME/ nor in runs/ yet, so an interrupted run goes
on, and writes the tables, and the scores and faithfulness of the circuit, to figures/NAME/.
Languages named at the end are the only ones that this process computes.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

import circuitlens as cl
from circuitlens.adapt import STRATEGIES
from circuitlens.experiments.cell_folder import CellFolder, Key
from circuitlens.tasks import toy
from circuitlens.utils.storage import write_json
from circuitlens.view.fronts import front_frame, transfer_fronts
from circuitlens.view.paper import export

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
# Under keep_source: those that the docs speak of with three seeds, the other rivals with one.
KEEPING = (
    (("circuit", "full", "lora-norms", "near-zero"), SEEDS),
    (
        ("neurons", "random-by-layer", "norms", "fisher", "circuit-lora", "shield", "lottery"),
        SEEDS[:1],
    ),
    (("head-scale", "head-bias"), SEEDS[:1]),
)
# Near to Indonesian (much of the vocabulary in common) and far.
NUSAX = ("javanese", "sundanese", "minangkabau", "acehnese", "toba_batak", "buginese")
# Hardly anything but training everything gets far in "far".
TOY = ("near", "far")
MINILM = ("eng_Latn", "spa_Latn", "ind_Latn", "jav_Latn")


def nusax(shared: Path, languages: tuple[str, ...]) -> cl.Comparison:
    """Sentiment: from Indonesian to local languages, 8 of 32 heads."""
    # The checkpoint learned its prompts behind <s>, which its tokenizer does not add.
    task = cl.load_task("nusax", "indonesian", data=shared / "data" / "nusax", bos=True)
    model = cl.load(shared / "models" / "nusa-tiny-ind")
    return _compare("nusax", model, task, languages or NUSAX, (3e-4, 1e-3, 3e-3), 10, 3)


def keep_source(shared: Path, languages: tuple[str, ...]) -> cl.Comparison:
    """The same languages, where rate and share of the way may cost the source at most one point."""
    task = cl.load_task("nusax", "indonesian", data=shared / "data" / "nusax", bos=True)
    model = cl.load(shared / "models" / "nusa-tiny-ind")
    baseline = cl.label_balanced_mean(model, task, quiet=True)
    scores = cl.relevance(model, task, baseline, quiet=True)
    for strategies, seeds in KEEPING:
        for seed in seeds:
            cl.compare(
                model,
                scores.top(0.25),
                task,
                languages or NUSAX,
                strategies=strategies,
                seeds=[seed],
                scores=scores,
                out=HERE.parent / "runs" / "keep-source",
                learning_rates=(3e-4, 1e-3, 3e-3),
                epochs=10,
                patience=3,
                accumulation=2,
                keep_source=0.01,
                test_front=True,
                quiet=True,
            )
    return cl.Comparison.load(HERE.parent / "runs" / "keep-source")


def toy_languages(languages: tuple[str, ...]) -> cl.Comparison:
    """The built-in artificial languages, a quarter of the heads."""
    task = cl.load_task("toy")
    model = cl.finetune(toy.toy_model(), task, **toy.TOY_FINETUNE)
    return _compare("toy", model, task, languages or TOY, (1e-3, 3e-3, 1e-2), 20, 20)


def minilm(shared: Path, checkpoint: str, languages: tuple[str, ...]) -> None:
    """Topics: an English sentence encoder with a new classification head, 18 of 72 heads.

    Writes what the others write, and the scorers compared with exact ablation. One seed, two
    languages, five strategies, two rates, four epochs: what two slow cores do in an hour.
    """
    there, out = HERE.parent / "runs" / "minilm", HERE / "minilm"
    out.mkdir(exist_ok=True)
    model, task = _competent_minilm(shared, checkpoint)
    seen = {code: task if code == task.language else task.to(code) for code in MINILM}
    zero_shot = {code: cl.evaluate(model, t, "test", quiet=True) for code, t in seen.items()}
    write_json(
        out / "before.json",
        "figures.before/1",
        {code: found.to_dict() for code, found in zero_shot.items()},
    )
    baseline = cl.label_balanced_mean(model, task, quiet=True)
    scores = cl.relevance(model, task, baseline, quiet=True)
    circuit = scores.top(0.25)
    scores.save(out / "scores.safetensors")
    circuit.save(out / "circuit.json")
    fresh = task.held_out[:150]
    curve = cl.faithfulness(model, task, scores, baseline, examples=fresh, n_random=10, quiet=True)
    curve.save(out / "faithfulness.safetensors")
    print(curve.to_frame().to_string(float_format="{:.3f}".format), flush=True)
    found = cl.compare(
        model,
        circuit,
        task,
        languages or MINILM[1:3],
        strategies=("circuit", "full", "lora", "near-zero", "random"),
        seeds=SEEDS[:1],
        scores=scores,
        out=there / "compare",
        learning_rates=(2e-4, 1e-3),
        epochs=4,
        quiet=True,
    )
    found.save(out)
    found.pairs().to_csv(out / "pairs.csv", index=False)
    print(found.summary().to_string(float_format="{:.3f}".format), flush=True)
    cl.compare_scorers(
        model,
        task,
        baseline,
        methods=["cdt-linear", "cdt", "midpoint", "attribution", "integrated-gradients"],
        max_examples=40,
        examples=fresh[:60],
        n_random=2,
        quiet=True,
    ).table.to_csv(out / "scorers.csv", index=False)


def minilm_keep_source(shared: Path, checkpoint: str, languages: tuple[str, ...]) -> cl.Comparison:
    """Topics again, where at most one point of English may be lost."""
    model, task = _competent_minilm(shared, checkpoint)
    scores = cl.relevance(model, task, cl.label_balanced_mean(model, task, quiet=True), quiet=True)
    for seed in SEEDS:
        cl.compare(
            model,
            scores.top(0.25),
            task,
            languages or ("spa_Latn", "ind_Latn", "jav_Latn", "swh_Latn"),
            strategies=("circuit", "full", "lora-norms"),
            seeds=[seed],
            scores=scores,
            out=HERE.parent / "runs" / "minilm-keep-source",
            learning_rates=(2e-4, 1e-3),
            epochs=4,
            keep_source=0.01,
            test_front=True,
            quiet=True,
        )
    return cl.Comparison.load(HERE.parent / "runs" / "minilm-keep-source")


def _competent_minilm(shared: Path, checkpoint: str) -> tuple[cl.HookedModel, cl.Task]:
    """The encoder fine-tuned on English topics, from a folder once it is there; and the task."""
    there = HERE.parent / "runs" / "minilm" / "proxy"
    task = cl.load_task("sib200", data=shared / "data" / "sib200")
    if not (there / "config.json").is_file():
        model = cl.load(checkpoint, labels=task)
        tuned = cl.finetune(model, task, learning_rate=2e-4, epochs=8, quiet=True)
        tuned.save(there)
    # Results name the model, and a path of some machine is no name.
    return cl.load(os.path.relpath(there)), task


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


def _keep(found: cl.Comparison, out: Path) -> None:
    """Write the tables; the cells have the answers at every point of every front, megabytes."""
    out.mkdir(parents=True, exist_ok=True)
    found.summary().to_csv(out / "summary.csv", index=False)
    # The question is who is ahead of training everything by the same rule.
    found.pairs("full").to_csv(out / "pairs.csv", index=False)
    found.fronts().to_csv(out / "fronts.csv", index=False)
    front_frame(found, split="test").to_csv(out / "fronts-test.csv", index=False)
    # Twelve lines in a panel show nothing: those that have all seeds.
    seeds = max(cell["seed"] for cell in found.cells)
    most = {cell["strategy"] for cell in found.cells if cell["seed"] == seeds}
    drawn = cl.Comparison(tuple(cell for cell in found.cells if cell["strategy"] in most))
    export(transfer_fronts(drawn), out / "fronts.svg", width="page")
    export(transfer_fronts(drawn, split="test"), out / "fronts-test.svg", width="page")
    print(found.summary().to_string(float_format="{:.3f}".format))


def main(name: str, *rest: str) -> None:
    """Compute and write one of the comparisons."""
    # Side by side with other work one thread is faster than two, and sums are the same everywhere.
    torch.set_num_threads(1)
    if name == "minilm":
        minilm(Path(rest[0]), rest[1], rest[2:])
        return
    if name.startswith("minilm"):
        found = minilm_keep_source(Path(rest[0]), rest[1], rest[2:])
    elif name == "keep-source":
        found = keep_source(Path(rest[0] if rest else "../shared"), rest[1:])
    elif name == "nusax":
        found = nusax(Path(rest[0] if rest else "../shared"), rest[1:])
    else:
        found = toy_languages(rest)
    if "keep" in name:
        _keep(found, HERE / {"keep-source": "nusax/keep-source"}.get(name, "minilm/keep-source"))
        return
    found.save(HERE / name)
    shutil.copyfile(HERE.parent / "runs" / name / "grid.json", HERE / name / "grid.json")
    found.pairs().to_csv(HERE / name / "pairs.csv", index=False)
    found.regret().to_csv(HERE / name / "regret.csv", index=False)
    print(found.summary().to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main(*sys.argv[1:])
