"""How a batch is divided: into parts run one after another, and among processes.

Every optimiser step sees the same examples with the same weights however it is divided, so the
result is that of one process with whole batches, up to rounding. Accelerate's own sharding repeats
examples to fill the last batch, and the Trainer's accumulation takes the mean of the parts' means.

The examples of a batch are ordered by length before they are divided: a part is padded to its own
longest example, which saves much of the work where lengths differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["AsIs", "Part", "Parts"]

# Index and weight in the loss of every example.
Part = list[tuple[int, float]]


class Parts(Sampler[Part]):
    """This process's parts of all batches of an epoch, ``n_parts`` for each batch.

    Args:
        lengths: of the examples.
        batch_size: examples per optimiser step, over all processes.
        n_parts: parts that one process runs one after another.
        rank, world: which process this is, and of how many.
        seed: with the epoch, of the order of the examples.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        n_parts: int = 1,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.n_parts = n_parts
        self.rank, self.world = rank, world
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.n_parts

    def __iter__(self) -> Iterator[Part]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for batch in order.split(self.batch_size):
            ranked = sorted(batch.tolist(), key=lambda i: self.lengths[i])
            # The Trainer divides by the number of parts, and processes take the mean of gradients.
            weight = self.n_parts * self.world / len(ranked)
            pieces = torch.tensor(ranked).tensor_split(self.n_parts * self.world)
            # Neighbours run side by side: they are of similar lengths.
            for piece in pieces[self.rank :: self.world]:
                # All processes have to take every step; one without examples adds nothing.
                yield [(i, weight) for i in piece.tolist()] or [(ranked[0], 0.0)]


class AsIs(Dataset[tuple[int, float]]):
    """Passes what the sampler chose to the collator."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, item: tuple[int, float]) -> tuple[int, float]:
        return item
