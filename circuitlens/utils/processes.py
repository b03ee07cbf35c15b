"""Processes that train together, as ``accelerate launch`` starts them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

__all__ = ["agreed", "is_main", "n_processes"]


def _state(device: torch.device) -> PartialState:
    # Accelerate sees processes on CPUs only if it is told so, and it keeps what it saw first.
    return PartialState(cpu=device.type == "cpu")


def n_processes(device: torch.device) -> int:
    """How many processes train together on such devices; 1 without Accelerate's launcher."""
    return int(_state(device).num_processes)


def is_main(device: torch.device) -> bool:
    """Whether this process writes; of those that train together, one does."""
    return bool(_state(device).is_main_process)


def agreed(value: Any, device: torch.device) -> Any:
    """The value of the main process, in all of them."""
    return broadcast_object_list([value])[0] if n_processes(device) > 1 else value
