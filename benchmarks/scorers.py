"""Agreement of the scorers with exact mean ablation, and the circuits that they find.

    python -m benchmarks.scorers ../shared

Prints, as Markdown, the table of `cl.compare_scorers` for the shared checkpoint `nusa-tiny-ind` on
NusaX Indonesian and for two models of the built-in toy language that are trained here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

import circuitlens as cl
from circuitlens.tasks import toy

SIZES = [0.125, 0.25, 0.3125, 0.5, 0.75]
COLUMNS = ["spearman", "overlap", "mlp_spearman", "area_f", "area_accuracy", "seconds"]


def _models(shared: Path | None) -> Iterator[tuple[str, cl.HookedModel, cl.Task]]:
    if shared is not None:
        task = cl.load_task("nusax", "indonesian", data=shared / "data" / "nusax")
        yield "nusa-tiny-ind", cl.load(shared / "models" / "nusa-tiny-ind"), task
    task = cl.load_task("toy")
    for seed, layers in ((0, 3), (1, 4)):
        model = cl.finetune(
            toy.toy_model(n_layers=layers, seed=seed), task, **{**toy.TOY_FINETUNE, "seed": seed}
        )
        yield f"toy, {layers} layers, seed {seed}", model, task


def _row(row: object) -> str:
    def cell(column: str) -> str:
        value = getattr(row, column)
        if value != value:
            return "–"
        if not column.endswith("spearman"):
            return f"{value:.1f}" if column == "seconds" else f"{value:.2f}"
        prefix = column.removesuffix("spearman")
        low, high = getattr(row, f"{prefix}low"), getattr(row, f"{prefix}high")
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    return " | ".join(map(cell, COLUMNS))


def main(shared: Path | None) -> None:
    torch.set_num_threads(1)
    header = ["model", "positions", "scorer", *COLUMNS]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    modes: tuple[Literal["all", "decision"], ...] = ("all", "decision")
    for name, model, task in _models(shared):
        for positions in modes:
            baseline = cl.label_balanced_mean(model, task, positions=positions)
            found = cl.compare_scorers(
                model, task, baseline, sizes=SIZES, max_examples=120, quiet=True
            )
            for row in found.to_frame().itertuples():
                print(f"| {name} | {positions} | {row.scorer} | {_row(row)} |", flush=True)
            print(
                f"<!-- {name}, {positions}: {found.n_examples} examples scored, faithfulness on "
                f"{found.n_held_out}, top {found.n_top} heads -->",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
