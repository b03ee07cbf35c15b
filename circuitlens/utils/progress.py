"""Progress bars: shown on terminals and in notebooks, silent elsewhere and with ``quiet``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["hushed_transformers", "interactive", "progress"]

T = TypeVar("T")


def interactive() -> bool:
    """Whether somebody is watching: a terminal on standard error, or a notebook kernel."""
    # Not whether ipykernel is imported: libraries do so anywhere.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return sys.stderr.isatty() or getattr(shell, "kernel", None) is not None


@contextmanager
def hushed_transformers(*, warnings: bool = True) -> Iterator[None]:
    """Within the block transformers draws no bars when nobody is watching.

    Args:
        warnings: let it warn; not where the caller says the same better.
    """
    from transformers.utils import logging

    # Left as they were found: they are those of the whole process.
    hush = logging.is_progress_bar_enabled() and not interactive()
    level = logging.get_verbosity()
    if hush:
        logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hush:
            logging.enable_progress_bar()


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
