"""What a transfer cost, as tables show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["COSTS", "all_passes", "text_loss_change"]

# Of a cell; older ones do not have all.
COSTS = ("n_trainable", "seconds", "passes", "discovery_passes", "peak_mib")


def all_passes(row: Mapping[Any, Any]) -> str:
    """Passes of a row of the summary, training and discovery; – where they were not counted."""
    found = [row["passes"], row["discovery_passes"]]
    return "–" if np.isnan(found[0]) else f"{np.nansum(found):,.0f}"


def text_loss_change(source: Mapping[str, Any] | None) -> float:
    """Next-token loss after minus before; NaN where it was not measured."""
    losses = (source or {}).get("text_loss")
    return losses[1] - losses[0] if losses else float("nan")
