"""Progress bars: shown on terminals and in notebooks, silent elsewhere and with ``quiet``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["hush_transformers", "interactive", "progress"]

T = TypeVar("T")


def interactive() -> bool:
    """Whether somebody is watching: a terminal on standard error, or a notebook kernel."""
    # Not whether ipykernel is imported: libraries do so anywhere.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return sys.stderr.isatty() or getattr(shell, "kernel", None) is not None


def hush_transformers() -> None:
    """Turn off the bars that transformers draws when nobody is watching."""
    if not interactive():
        from transformers.utils import logging

        logging.disable_progress_bar()


def progress(
    items: Iterable[T], label: str, *, quiet: bool = False, total: int | None = None
) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar that appears after two seconds."""
    bar: Iterable[T] = tqdm(
        items,
        desc=label,
        total=total,
        delay=2,
        leave=False,
        disable=quiet or not interactive(),
    )
    return iter(bar)
