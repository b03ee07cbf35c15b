"""Disks that are full or read-only, reported in one sentence whatever a library calls it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from circuitlens.errors import CircuitLensError, InputError

__all__ = ["writing_to"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# Libraries that write by themselves say anything when there is no room; with less than this left
# that is why.
_LEAST = 64 * 1024


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn failures to write in this block into one of our errors.

    Raises:
        InputError: if the disk is full, or the folder may not be written.
    """
    try:
        yield
    except CircuitLensError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, OSError) and number in _FORBIDDEN:
            raise InputError(
                f"{folder} cannot be written to ({error.strerror}): choose another folder, or "
                "change its permissions."
            ) from error
        said = number in _FULL or "No space left" in str(error)
        if said or (number is None and _free(folder) < _LEAST):
            raise InputError(
                f"The disk of {folder} is full: free some space and repeat the call. Finished "
                "results are kept, and not computed again."
            ) from error
        raise


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
