"""Which heads have to change, for what? Transfers to toy languages that differ in one thing alone.

CT-SFT holds that hard transfers want the circuit edited and easy ones want it preserved. Here the
difference between two languages is known: words, negation, the order of words, or all of them.
Every strategy but ``full`` trains all norms, and all but ``norms`` the same number of heads.

    python -m benchmarks.kinds                             # three models, some minutes each
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import circuitlens as cl
from circuitlens.tasks import toy

STRATEGIES = (
    "circuit",
    "near-zero",
    "random-by-layer",
    "fisher",
    "lost-relevance",
    "norms",
    "full",
)


def proxy(seed: int, layers: int, n_test: int) -> tuple[cl.HookedModel, cl.Task, cl.HeadScores]:
    """A model that knows the source language, and the relevance of its heads."""
    source = toy.ToyLanguages(seed=0, n_test=n_test)
    task = cl.Task.from_source(source, "source", name="toy", **toy.TOY_PROMPT)
    model = toy.toy_model(n_layers=layers, seed=seed)
    model = cl.finetune(model, task, **{**toy.TOY_FINETUNE, "seed": seed}, quiet=True)
    baseline = cl.label_balanced_mean(model, task, examples=task["pool_a"][:600], quiet=True)
    return model, task, cl.relevance(model, task, baseline, quiet=True)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Transfer to every language by every strategy."""
    for seed in args.seeds:
        model, task, scores = proxy(seed, args.layers, args.n_test)
        circuit = scores.top(0.25)
        grid = cl.compare(
            model,
            circuit,
            task,
            args.languages,
            strategies=args.strategies,
            seeds=[seed],
            scores=scores,
            learning_rates=[1e-3, 3e-3, 1e-2],
            epochs=args.epochs,
            keep_source=0.02,
            quiet=True,
        )
        for cell in grid.cells:
            kept = cell["retained"]
            yield {
                "benchmark": "kinds",
                "layers": args.layers,
                "seed": seed,
                "language": cell["target_language"],
                "strategy": cell["strategy"],
                "target_before": round(cell["target_before"]["accuracy"], 4),
                "target_after": round(cell["target_after"]["accuracy"], 4),
                "source_before": round(kept[0]["before"]["accuracy"], 4) if kept else None,
                "source_after": round(kept[0]["after"]["accuracy"], 4) if kept else None,
                "rate": cell["learning_rate"],
                "alpha": cell["alpha"],
                "n_trainable": cell["n_trainable"],
            }


def main() -> None:
    """Print one JSON object per transfer."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--n-test", type=int, default=4000)
    parser.add_argument("--languages", nargs="*", default=list(toy.TOY_KINDS))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    for row in rows(parser.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
