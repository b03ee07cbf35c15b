"""How many threads a command uses."""

from __future__ import annotations

import logging
import os

import torch
from torch import nn

__all__ = ["SMALL", "settle_threads"]

logger = logging.getLogger(__name__)

# Parameters below which the matrices of a model are too small to be worth dividing. Measured on two
# cores: an epoch of the toy model takes as long with one thread as with two, and beside other work
# two threads wait for each other.
SMALL = 5_000_000


def settle_threads(model: nn.Module) -> None:
    """Compute with one thread if the model is small and on a processor, unless told otherwise.

    For commands, which have a process of their own; ``OMP_NUM_THREADS`` tells otherwise.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    if not (on_cpu and small) or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        return
    logger.info("One thread: the model is small (OMP_NUM_THREADS=2 and so on for more).")
    torch.set_num_threads(1)
