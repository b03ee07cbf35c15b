"""Tables on the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from circuitlens.utils.strangers import on_one_line

if TYPE_CHECKING:
    import pandas as pd

    from circuitlens.adapt import TransferResult
    from circuitlens.experiments import SimpleRival
    from circuitlens.planning import Plan

__all__ = ["pairs_table", "plan_table", "strategy_table", "summary_table"]


def plan_table(plan: Plan) -> Table:
    """One row per stage."""
    table = Table(title="Plan: at most")
    table.add_column("stage")
    for name in ("examples", "forward passes", "backward", "tokens", "seconds", "GiB"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        counts = (stage.examples, stage.forward, stage.backward, stage.tokens)
        numbers = [f"{count:,.0f}" for count in counts]
        table.add_row(
            on_one_line(stage.name),
            *numbers,
            f"{stage.seconds:,.1f}",
            f"{stage.memory / 2**30:.2f}",
        )
    return table


def strategy_table(results: Sequence[TransferResult], rivals: Sequence[SimpleRival] = ()) -> Table:
    """One row per transfer, and one for each simple rival."""
    table = Table(title="Transfer: test accuracy in percent")
    table.add_column("target")
    table.add_column("strategy")
    for name in ("target before", "after", "gain", "macro-F1", "source before", "after"):
        table.add_column(name, justify="right")
    for name in ("trained", "rate", "seconds"):
        table.add_column(name, justify="right")

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    for r in results:
        before, after = r.source_before, r.source_after
        table.add_row(
            on_one_line(r.target_language),
            on_one_line(r.strategy),
            percent(r.target_before.accuracy),
            percent(r.target_after.accuracy),
            f"{100 * r.target_gain:+.1f}",
            percent(r.target_after.macro_f1),
            percent(before.accuracy if before else None),
            percent(after.accuracy if after else None),
            f"{r.n_trainable:,}",
            f"{r.learning_rate:g}",
            f"{r.seconds:.1f}",
        )
    before_of = {r.target_language: r.target_before.accuracy for r in results}
    for rival in rivals:
        accuracy, start = rival.result.accuracy, before_of[rival.language]
        table.add_row(
            on_one_line(rival.language),
            on_one_line(rival.name),
            percent(start),
            percent(accuracy),
            f"{100 * (accuracy - start):+.1f}",
            percent(rival.result.macro_f1),
            "–",
            "–",
            f"{rival.n_features * len(rival.result.labels):,}",
            "–",
            f"{rival.seconds:.1f}",
        )
    return table


def summary_table(summary: pd.DataFrame) -> Table:
    """One row per language and strategy."""
    # Imported here: it needs pandas, and tables of plans do not.
    from circuitlens.experiments.costs import all_passes

    table = Table(title="Test accuracy in percent, means over seeds ± standard deviation")
    table.add_column("target")
    table.add_column("strategy")
    for name in ("seeds", "target before", "after", "gain", "source before", "after"):
        table.add_column(name, justify="right")
    for name in ("trained", "seconds", "passes", "MiB"):
        table.add_column(name, justify="right")

    def percent(mean: float, sd: float = math.nan) -> str:
        # NaN: there is no source task, or one seed and so no spread.
        spread = "" if math.isnan(sd) else f" ± {100 * sd:.1f}"
        return "–" if math.isnan(mean) else f"{100 * mean:.1f}{spread}"

    for row in summary.to_dict("records"):
        table.add_row(
            on_one_line(row["language"]),
            on_one_line(row["strategy"]),
            str(row["n_seeds"]),
            percent(row["target_before"]),
            percent(row["target_after"], row["target_after_sd"]),
            f"{100 * row['gain']:+.1f}",
            percent(row["source_before"]),
            percent(row["source_after"], row["source_after_sd"]),
            f"{row['n_trainable']:,.0f}",
            f"{row['seconds']:.1f}",
            all_passes(row),
            f"{row['peak_mib']:.0f}",
        )
    return table


def pairs_table(pairs: pd.DataFrame, reference: str) -> Table:
    """One row per difference."""
    table = Table(
        title=f"Target accuracy of {on_one_line(reference)} minus that of others, in points"
    )
    table.add_column("target")
    table.add_column("other")
    for name in ("difference", "95 % interval", "p", "p (Holm)", "examples", "seeds"):
        table.add_column(name, justify="right")
    for row in pairs.to_dict("records"):
        table.add_row(
            on_one_line(row["language"]),
            on_one_line(row["b"]),
            f"{100 * row['difference']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['p']:.3f}" if row["p"] else "< 0.002",
            f"{row['p_holm']:.3f}" if row["p_holm"] else "< 0.002",
            str(row["n_examples"]),
            str(row["n_seeds"]),
        )
    return table
