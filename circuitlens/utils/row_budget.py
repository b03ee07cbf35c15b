"""As many rows at once as fit: work in chunks that halve when the memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from circuitlens.errors import InputError

__all__ = ["RowBudget"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RowBudget:
    """How many rows (prompts) go through a model at once.

    One budget serves many calls: what the first of them found to be too much is not tried again.

    Attributes:
        rows: the present limit. It falls by half whenever memory runs out, and never rises.

    Raises:
        InputError: if ``rows`` is not positive.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise InputError(f"The number of rows at once must be positive, but is {rows}.")
        self.rows = rows

    def chunked(self, n: int, run: Callable[[range], T], *, rows_per_item: int = 1) -> list[T]:
        """Call ``run`` on consecutive pieces of ``range(n)`` that keep within the limit.

        Args:
            n: number of items.
            run: does the work of some items. If it runs out of memory it is called again with
                fewer of them, so what it writes elsewhere must bear being written twice.
            rows_per_item: rows that each item takes; an item that takes more than the limit goes
                alone.

        Returns:
            What ``run`` returned for each piece, in order.

        Raises:
            RuntimeError: of the allocator, if a single item does not fit.
        """
        results: list[T] = []
        done = 0
        while done < n:
            size = min(max(1, self.rows // rows_per_item), n - done)
            try:
                results.append(run(range(done, done + size)))
            except RuntimeError as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
            else:
                done += size
                continue
            # Only here, behind the except clause, are the frames that hold tensors gone.
            clear_device_cache(garbage_collection=True)
            self.rows = size * rows_per_item // 2
            logger.warning("Out of memory; continuing with %d rows at once.", self.rows)
        return results
