"""Progress bars: shown on terminals and in notebooks, silent elsewhere and with ``quiet``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm.auto import tqdm

__all__ = ["RunClock", "hushed_transformers", "interactive", "progress", "spoken", "tell_run"]

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


def spoken(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class RunClock:
    """What is left of a run of several stages, for the progress bars of each.

    Stages that are over tell how far the plan was off, by which those to come are corrected.
    """

    def __init__(self) -> None:
        self._left: dict[str, float] = {}
        self._planned = self._took = 0.0

    def begin(self, planned: Mapping[str, float]) -> None:
        """Take the planned seconds of every stage, in their order."""
        self._left = dict(planned)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within the block, progress bars tell the time to the end of the run."""
        if name not in self._left:
            yield  # nobody has planned it
            return
        # Those before it that were not run were finished already.
        while (first := next(iter(self._left))) != name:
            self.skip(first)
        planned = self._left.pop(name)
        start = time.perf_counter()
        token = _clock.set(self)
        try:
            yield
        finally:
            _clock.reset(token)
        self._planned += planned
        self._took += time.perf_counter() - start

    def skip(self, name: str) -> None:
        """Leave out a stage that was finished before."""
        self._left.pop(name, None)

    def left(self, of_stage: float) -> float:
        """Seconds to the end of the run, with those to the end of this stage."""
        off = self._took / self._planned if self._planned else 1.0
        return of_stage + off * sum(self._left.values())


_clock: ContextVar[RunClock | None] = ContextVar("clock", default=None)


def progress(
    items: Iterable[T], label: str, *, quiet: bool = False, total: int | None = None
) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar that appears after two seconds."""
    bar: tqdm[T] = tqdm(
        items,
        desc=label,
        total=total,
        delay=2,
        leave=False,
        disable=quiet or not interactive(),
    )
    return iter(bar) if bar.disable else _telling(bar)


def _telling(bar: tqdm[T]) -> Iterator[T]:
    for item in bar:
        tell_run(bar)
        yield item


def tell_run(bar: tqdm[Any]) -> None:
    """Let a bar tell what is left of the run that it is part of, if it is part of one."""
    clock, now = _clock.get(), bar.format_dict
    if clock is not None and now["n"] and now["total"]:
        left = clock.left(now["elapsed"] / now["n"] * (now["total"] - now["n"]))
        bar.set_postfix_str(f"run: {spoken(left)} left", refresh=False)
