"""Circuits of GPT-2 small as their authors published them, to compare a found one with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from circuitlens.circuit import Circuit
from circuitlens.errors import InputError, check_choice

__all__ = ["PUBLISHED", "PublishedCircuit", "published_circuit"]


@dataclass(frozen=True)
class PublishedCircuit:
    """The heads of a published circuit.

    Attributes:
        task: name of the task, as :func:`circuitlens.load_task` knows it.
        model: the model that they are heads of.
        source: the paper.
        groups: the heads by the function that the authors give them.
        n_layers, n_heads: size of the model's head grid.
    """

    task: str
    model: str
    source: str
    groups: Mapping[str, tuple[str, ...]]
    n_layers: int = 12
    n_heads: int = 12

    @property
    def circuit(self) -> Circuit:
        """All heads of all groups."""
        heads = [head for group in self.groups.values() for head in group]
        found = Circuit.of(heads, self.n_layers, self.n_heads)
        return Circuit(found.heads, self.n_layers, self.n_heads, f"published: {self.source}")

    def overlap(self, circuit: Circuit) -> pd.DataFrame:
        """Compare a circuit with this one, group by group.

        Returns:
            One row per group, one for ``all``: ``published`` (its number of heads), ``found`` (how
            many of them the circuit has), ``expected`` (how many as large a circuit drawn at
            random would have on average) and ``heads`` (their names).

        Raises:
            InputError: if the circuit is of a model of another size.
        """
        if (circuit.n_layers, circuit.n_heads) != (self.n_layers, self.n_heads):
            raise InputError(
                f"The published circuit is of {self.model} ({self.n_layers} × {self.n_heads} "
                f"heads), but this one of a model of {circuit.n_layers} × {circuit.n_heads}."
            )
        share = len(circuit) / (self.n_layers * self.n_heads)
        everything = tuple(str(head) for head in self.circuit)
        rows = []
        for group, heads in {**self.groups, "all": everything}.items():
            found = [head for head in heads if head in circuit]
            rows.append(
                {
                    "group": group,
                    "published": len(heads),
                    "found": len(found),
                    "expected": share * len(heads),
                    "heads": ", ".join(found),
                }
            )
        return pd.DataFrame(rows)


PUBLISHED: dict[str, PublishedCircuit] = {
    found.task: found
    for found in (
        PublishedCircuit(
            "ioi",
            "gpt2",
            "Wang et al. 2023, arXiv 2211.00593",
            {
                "name movers": ("a9.h6", "a9.h9", "a10.h0"),
                "backup name movers": (
                    *("a9.h0", "a9.h7", "a10.h1", "a10.h2", "a10.h6", "a10.h10", "a11.h2"),
                    "a11.h9",
                ),
                "negative name movers": ("a10.h7", "a11.h10"),
                "S-inhibition": ("a7.h3", "a7.h9", "a8.h6", "a8.h10"),
                "induction": ("a5.h5", "a5.h8", "a5.h9", "a6.h9"),
                "duplicate token": ("a0.h1", "a0.h10", "a3.h0"),
                "previous token": ("a2.h2", "a4.h11"),
            },
        ),
        PublishedCircuit(
            "greater-than",
            "gpt2",
            "Hanna et al. 2023, arXiv 2305.00586",
            {
                "read the start year": ("a0.h1", "a0.h3", "a0.h5"),
                "attend to the start year": (
                    *("a5.h1", "a5.h5", "a6.h9", "a7.h10", "a8.h8", "a8.h11", "a9.h1"),
                ),
            },
        ),
    )
}


def published_circuit(task: str) -> PublishedCircuit:
    """Look up a published circuit of GPT-2 small by the name of its task.

    Raises:
        InputError: for a task without one (those with one are listed).
    """
    check_choice("task", task, PUBLISHED)
    return PUBLISHED[task]
