"""Options that say where transfers are run."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from circuitlens.errors import InputError

if TYPE_CHECKING:
    from circuitlens.experiments import RayCluster

__all__ = ["Address", "CPUs", "Executor", "GPUs", "runner_of_options"]


class _Name(StrEnum):
    PROCESSES = "processes"
    RAY = "ray"


Executor = Annotated[
    _Name | None,
    typer.Option(
        metavar="NAME",
        help="Run transfers side by side: processes, on this machine, or ray, on a cluster too.",
    ),
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster: auto, or HOST:PORT.")]
CPUs = Annotated[int, typer.Option("--cpus", min=1, help="CPUs per transfer on Ray.")]
GPUs = Annotated[
    float | None,
    typer.Option("--gpus", min=0, help="GPUs per transfer on Ray; may be fractions."),
]


def runner_of_options(
    name: str | None, address: str | None, cpus: int, gpus: float | None
) -> RayCluster | str | None:
    """What runs transfers according to these options.

    Raises:
        InputError: for options of Ray without it.
    """
    if name != "ray":
        if address is not None or gpus is not None or cpus != 1:
            raise InputError("--address, --cpus and --gpus need --executor ray: add it.")
        return None if name is None else str(name)
    from circuitlens.experiments import RayCluster

    return RayCluster(address, cpus, gpus)
