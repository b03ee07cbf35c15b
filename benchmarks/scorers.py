"""Agreement of the scorers with exact mean ablation, and the circuits that they find.

    python -m benchmarks.scorers ../shared

Prints a Markdown table for the shared checkpoint ``nusa-tiny-ind`` on NusaX Indonesian.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import circuitlens as cl

SIZES = [4, 8, 10, 16, 24]
DRAWS = 500


def _interval(scores: cl.HeadScores, exact: cl.HeadScores) -> tuple[float, float]:
    """Bootstrap interval of the rank correlation over examples, both resampled alike."""
    a, b = (s.per_example.double().numpy().reshape(len(s.example_ids), -1) for s in (scores, exact))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(a), size=len(a))
        drawn.append(spearmanr(a[chosen].mean(0), b[chosen].mean(0)).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def main(shared: Path) -> None:
    model = cl.load(shared / "models" / "nusa-tiny-ind")
    task = cl.load_task("nusax", "indonesian", data=shared / "data" / "nusax")
    columns = ["positions", "scorer", "Spearman", "95 % interval", "seconds"]
    columns += ["f, 8 heads", "f, 16", "mean f"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for positions in ("all", "decision"):
        baseline = cl.label_balanced_mean(model, task, positions=positions)
        found: dict[str, cl.HeadScores] = {}
        seconds: dict[str, float] = {}
        for method in ("ablation", *(m for m in cl.METHODS if m not in ("ablation", "random"))):
            start = time.perf_counter()
            found[method] = cl.relevance(model, task, baseline, method=method)
            seconds[method] = time.perf_counter() - start
        for method, scores in found.items():
            exact = found["ablation"]
            rank = spearmanr(scores.mean.flatten(), exact.mean.flatten()).statistic
            low, high = _interval(scores, exact)
            curve = cl.faithfulness(model, task, scores, baseline, sizes=SIZES, n_random=10)
            f = dict(zip(curve.sizes, curve.faithfulness, strict=True))
            mean_f = np.mean([f[s] for s in SIZES])
            interval = "" if method == "ablation" else f"{low:.2f} to {high:.2f}"
            print(
                f"| {positions} | `{method}` | {rank:.2f} | {interval} | {seconds[method]:.1f} | "
                f"{f[8]:.2f} | {f[16]:.2f} | {mean_f:.2f} |",
                flush=True,
            )
        # The same random circuits for every method, so any of the curves has them.
        middle = curve.random_faithfulness[:, 1:-1].mean(0)
        at = dict(zip(SIZES, middle, strict=True))
        print(
            f"| {positions} | random circuits (10) | – | – | – | {at[8]:.2f} | {at[16]:.2f} | "
            f"{middle.mean():.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared"))
