"""One process on a folder at a time."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from filelock import FileLock, Timeout

from circuitlens.errors import InputError

__all__ = ["claimed", "claiming"]

P = ParamSpec("P")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder in this block, on this machine.

    The lock lies with the temporary files, so that nothing is left in the folder; it goes when the
    process ends, however it does. Processes that work together (``accelerate launch``) are one.

    Raises:
        InputError: if another process holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    # Not utils.storage, which waits for torch.
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"circuitlens-{place}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another process is using {folder}: wait until it has ended, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def claiming(function: Callable[P, None]) -> Callable[P, None]:
    """Let a command hold the folder that it writes to, its argument ``folder`` or ``out``."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> None:
        folder = kwargs.get("folder", kwargs.get("out"))
        assert isinstance(folder, Path)
        with claimed(folder):
            function(*args, **kwargs)

    return held
