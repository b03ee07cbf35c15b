"""Files of a run that several processes share (``accelerate launch``).

All of them run the same stages; one decides what is there already, and writes. What the others do
meanwhile must be the same, so they ask it, and wait.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from circuitlens.utils.processes import agreed, is_main, together
from circuitlens.utils.room import writing_to
from circuitlens.utils.storage import replacing

__all__ = ["SharedFiles"]


S = TypeVar("S")


class SharedFiles:
    """Reading and writing for processes on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return is_main(self._device)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        together(self._device)

    def agreed(self, value: bool) -> bool:
        """What the process that writes says."""
        return agreed(value, self._device)

    def there(self, path: Path) -> bool:
        """Whether a file or folder is there, for all processes alike."""
        return self.agreed(path.exists())

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file that is whole once it is there."""
        if self.writes:
            with replacing(path) as temporary:
                write(temporary)
        self.wait()

    def write_folder(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a folder that is whole once it is there."""
        temporary = path.with_name(f".{path.name}")
        self.remove(temporary)
        try:
            if self.writes:
                write(temporary)
                with writing_to(path.parent):
                    temporary.rename(path)
        finally:
            self.remove(temporary)

    def remove(self, folder: Path) -> None:
        """Remove a folder, if it is there."""
        if self.writes:
            shutil.rmtree(folder, ignore_errors=True)
        self.wait()

    def kept(
        self,
        path: Path,
        load: Callable[[Path], S],
        make: Callable[[], S],
        around: AbstractContextManager[None] | None = None,
    ) -> S:
        """A result from its file, or made now and written there.

        Args:
            path: of the file.
            load: reads it.
            make: makes it; it has a method ``save``.
            around: is entered while it is made.
        """
        if self.there(path):
            return load(path)
        with around or nullcontext():
            found = make()
        if self.writes:
            cast(Any, found).save(path)
        self.wait()
        return found
