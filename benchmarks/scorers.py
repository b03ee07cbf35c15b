"""How good the circuits of each scorer are, on which model, and what scoring costs.

    python -m benchmarks.scorers ../shared                  # the checkpoint, and six toy models
    python -m benchmarks.scorers --models toy-3-9           # one of them: layers and seed
    python -m benchmarks.scorers ../shared --models minilm --checkpoint path/to/all-MiniLM-L6-v2

Prints a JSON object for every model and scorer: areas under f and accuracy of circuits of 12.5
to 75 % of the heads, on examples that discovery did not see, over several random samples of the
discovery examples, as shares of what `greedy` reaches on the same samples; Spearman with exact
ablation on the first sample; and passes, counted. The toy models are trained here, the classifier
of `minilm` too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import circuitlens as cl
from circuitlens.tasks import toy

SIZES = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75]
# Layers and seed. Ideas were chosen on the first four; the last three saw none of that.
TOYS = ["toy-2-2", "toy-3-0", "toy-4-1", "toy-4-4", "toy-2-8", "toy-3-9", "toy-4-10"]
METHODS = ["cdt-linear", "midpoint", "attribution", "iterative", "sampled", "auto", "greedy"]


def opened(name: str, shared: Path | None, checkpoint: str) -> tuple[cl.HookedModel, cl.Task]:
    """The model of that name and its task."""
    if name.startswith("toy"):
        layers, seed = map(int, name.split("-")[1:])
        task = cl.load_task("toy")
        fresh = toy.toy_model(n_layers=layers, seed=seed)
        return cl.finetune(fresh, task, quiet=True, **{**toy.TOY_FINETUNE, "seed": seed}), task
    if shared is None:
        raise SystemExit(f"{name} needs the folder of shared data.")
    if name == "nusa-tiny-ind":
        task = cl.load_task("nusax", "indonesian", data=shared / "data" / "nusax")
        return cl.load(shared / "models" / "nusa-tiny-ind"), task
    task = cl.load_task("sib200", data=shared / "data" / "sib200")
    model = cl.load(checkpoint, labels=task)
    return cl.finetune(model, task, learning_rate=2e-4, epochs=6, quiet=True), task


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("shared", nargs="?", type=Path, help="folder of the shared data")
    parser.add_argument("--models", nargs="*", default=["nusa-tiny-ind", *TOYS])
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--checkpoint", default="", help="of minilm")
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        model, task = opened(name, args.shared, args.checkpoint)
        baseline = cl.label_balanced_mean(model, task, quiet=True)
        found = cl.compare_scorers(
            model,
            task,
            baseline,
            methods=args.methods,
            sizes=SIZES,
            mlps=False,
            max_examples=args.examples,
            samples=args.samples,
            examples=task.held_out[: args.held_out],
            quiet=True,
        )
        about = {"benchmark": "scorers", "model": name, "samples": args.samples}
        about |= {"n_examples": found.n_examples, "n_held_out": found.n_held_out}
        for row in found.table.to_dict("records"):
            kept = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            kept = {k: v for k, v in kept.items() if v == v and k != "peak_mib"}
            print(json.dumps({**about, **kept}), flush=True)


if __name__ == "__main__":
    main()
