"""Processes that work together, as ``accelerate launch`` starts them.

All of them run the same program. Training shares the examples of every step; discovery shares its
batches (:func:`mine`), and :func:`summed` and :func:`gathered` give each process what all of them
found. So every process has to make the same calls: one that skips a call leaves the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

__all__ = ["agreed", "gathered", "is_main", "mine", "n_processes", "summed", "together"]

T = TypeVar("T")


def _state(device: torch.device) -> PartialState:
    # Accelerate sees processes on CPUs only if it is told so, and it keeps what it saw first.
    return PartialState(cpu=device.type == "cpu")


def n_processes(device: torch.device) -> int:
    """How many processes work together on such devices; 1 without Accelerate's launcher."""
    return int(_state(device).num_processes)


def is_main(device: torch.device) -> bool:
    """Whether this process writes; of those that work together, one does."""
    return bool(_state(device).is_main_process)


def together(device: torch.device) -> None:
    """Wait until all processes have come here."""
    _state(device).wait_for_everyone()


def agreed(value: T, device: torch.device) -> T:
    """The value of the main process, in all of them."""
    if n_processes(device) == 1:
        return value
    found: T = broadcast_object_list([value])[0]
    return found


def mine(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """This process's share of what all of them have to do, dealt like cards."""
    state = _state(device)
    return islice(items, state.process_index, None, state.num_processes)


def summed(values: Tensor, device: torch.device) -> Tensor:
    """Sum a tensor over the processes.

    What one process found and the others left at zero keeps its bits.
    """
    if n_processes(device) == 1:
        return values
    # NCCL adds up what is on GPUs only.
    found: Tensor = reduce(values.to(device), reduction="sum")
    return found.to(values.device)


def gathered(values: list[Any], device: torch.device) -> list[Any]:
    """The items of the lists of all processes."""
    return values if n_processes(device) == 1 else list(gather_object(values))
