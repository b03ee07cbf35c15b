"""Ratios of medians, both sides timed in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

REPEATS = 5


def ratio(ours: Callable[[], Any], rival: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of both after one warm-up each, and their ratio with its least and most."""
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    for number in range(REPEATS + 1):
        for name, function in (("ours", ours), ("rival", rival)):
            start = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    each = [a / b for a, b in zip(times["ours"], times["rival"], strict=True)]
    return {
        "ratio": round(medians["ours"] / medians["rival"], 3),
        "ratio_min": round(min(each), 3),
        "ratio_max": round(max(each), 3),
        "ours_s": round(medians["ours"], 4),
        "rival_s": round(medians["rival"], 4),
    }
