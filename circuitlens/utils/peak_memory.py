"""Peak memory of a piece of work, beyond what was in use before."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

__all__ = ["PeakMemory"]

_INTERVAL = 0.002


class PeakMemory:
    """Context manager that measures the peak memory of its block.

    On CUDA it is what PyTorch's allocator counts, exactly. On the CPU it is the growth of the
    process's resident memory, looked at every 2 ms: memory that was freed before but not returned
    to the system is used again unseen, so small figures are too low.

    Attributes:
        mib: growth in MiB, once the block has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.mib = 0.0
        self._start = self._peak = 0
        self._device = device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            self._start = self._peak = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._thread.join()
            self._peak = max(self._peak, self._process.memory_info().rss)
        self.mib = (self._peak - self._start) / 2**20
