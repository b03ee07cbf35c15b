"""Circuits of other nodes than heads, and other references than label-balanced means.

    python -m benchmarks.nodes ../shared                    # the checkpoint, and four toy models
    python -m benchmarks.nodes --models toy-3-0             # one of them: layers and seed

Prints a JSON object for every model and kind of node: Spearman of `cdt-linear` with exact ablation
over heads and MLPs and over MLPs alone; the area under f of circuits of 12.5 to 75 % of the nodes,
or of 1 to 20 % of the neurons, beside random ones; and for every reference the area under f of the
circuits that it finds, measured by itself and with label-balanced means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import circuitlens as cl
from benchmarks.scorers import SIZES, opened

TOYS = ["toy-2-2", "toy-3-0", "toy-4-1", "toy-2-8"]
NEURONS = [0.01, 0.02, 0.05, 0.1, 0.2]
REFERENCES = ("label-balanced", "mean", "zero", "optimal", "resample")


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("shared", nargs="?", type=Path, help="folder of the shared data")
    parser.add_argument("--models", nargs="*", default=["nusa-tiny-ind", *TOYS])
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        model, task = opened(name, args.shared, "")
        held = task.held_out[: args.held_out]
        some = {"max_examples": args.examples, "quiet": True}
        baseline = cl.label_balanced_mean(model, task, quiet=True)

        def show(**found: Any) -> None:
            kept = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
            print(json.dumps({"benchmark": "nodes", "model": name, **kept}), flush=True)  # noqa: B023

        def kept(
            scores: cl.HeadScores | cl.NodeScores,
            by: cl.MeanBaseline,
            sizes: list[float] = SIZES,
        ) -> cl.FaithfulnessCurve:
            given = {"sizes": sizes, "examples": held, "n_random": 5, "quiet": True}  # noqa: B023
            return cl.faithfulness(model, task, scores, by, **given)  # type: ignore[arg-type]  # noqa: B023

        scores = cl.relevance(model, task, baseline, mlps=True, **some)
        exact = cl.relevance(model, task, baseline, method="ablation", mlps=True, **some)
        both, truly = cl.NodeScores.with_mlps(scores), cl.NodeScores.with_mlps(exact)
        curve, by_ablation = kept(both, baseline), kept(truly, baseline)
        show(
            nodes="heads+mlps",
            n=len(both.grid),
            spearman=float(spearmanr(both.mean.flatten(), truly.mean.flatten()).statistic),
            spearman_mlps=float(spearmanr(scores.mlp_mean, exact.mlp_mean).statistic),
            area=curve.area(),
            area_by_ablation=by_ablation.area(),
            random=float(curve.random_faithfulness.mean(0)[1:-1].mean()),
        )
        neurons = cl.neuron_relevance(model, task, baseline, **some)
        curve = kept(neurons, baseline, NEURONS)
        show(
            nodes="neurons",
            n=len(neurons.grid),
            f={f"{share:g}": round(float(curve.at(n)["faithfulness"]), 3)
               for share, n in zip(NEURONS, curve.sizes[1:-1], strict=True)},
            random={f"{share:g}": round(float(curve.at(n)["random_faithfulness"]), 3)
                    for share, n in zip(NEURONS, curve.sizes[1:-1], strict=True)},
        )  # fmt: skip
        for reference in REFERENCES:
            other = cl.label_balanced_mean(model, task, reference=reference, quiet=True)
            found = cl.relevance(model, task, other, **some)
            own, common = kept(found, other), kept(found, baseline)
            show(
                reference=reference,
                spearman=float(spearmanr(found.mean.flatten(), scores.mean.flatten()).statistic),
                area=own.area(),
                random=float(own.random_faithfulness.mean(0)[1:-1].mean()),
                empty=float(own.accuracy[0]),
                area_label_balanced=common.area(),
                accuracy_label_balanced=common.area("accuracy"),
            )


if __name__ == "__main__":
    main()
