"""Cells as Ray tasks, on the cores and GPUs of one machine or of a cluster.

1. The model, saved as files, and for each language the task with all settings are put into Ray's
   object store once; a cell carries only its key.
2. Every node that runs a cell writes the files to its own disk once, and its workers load them from
   there: no file system is shared.
3. Numbers travel back to the driver, which writes them as they come. A cell whose worker or node
   died is run again elsewhere.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock

from circuitlens.errors import CircuitLensError, InputError
from circuitlens.experiments.cell_folder import Key
from circuitlens.experiments.cells import CellSpec, ModelReference

__all__ = ["RayCluster"]

logger = logging.getLogger(__name__)

R = TypeVar("R")
Files = dict[str, np.ndarray]

_WAIT = 5.0
# The head node may be busy for a moment.
_PATIENCE = 3


@dataclass(frozen=True)
class RayCluster:
    """Where and with what cells are run: ``cl.compare(…, executor=RayCluster(…))``.

    Attributes:
        address: ``"auto"`` for the cluster that this machine is part of, or ``HOST:PORT`` of a head
            node; without one, a local Ray is started, or the one that this process uses.
        num_cpus: CPUs of a cell, which computes with as many threads.
        num_gpus: GPUs of a cell, fractions too; by default 1 if the model is on a GPU.
        memory: bytes of main memory that a cell reserves; by default none.
        retries: how many times a cell is run again if its worker or node dies.
    """

    address: str | None = None
    num_cpus: int = 1
    num_gpus: float | None = None
    memory: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if self.num_cpus < 1 or self.retries < 0 or (self.num_gpus or 0) < 0:
            raise InputError(
                "A cell on Ray needs num_cpus of at least 1, and neither num_gpus nor retries "
                "below 0."
            )

    def run(
        self, work: Callable[[CellSpec], R], specs: Sequence[CellSpec]
    ) -> Iterator[tuple[Key, R | Exception]]:
        """Yield what ``work`` makes of each cell, or why it failed, as they are finished.

        Raises:
            InputError: if Ray is not installed, there is no cluster, or it cannot give a cell what
                it asks for.
            CircuitLensError: if the head node no longer answers.
        """
        if not specs:
            return
        with _connected(self.address) as ray:
            (reference,) = {spec.model for spec in specs if isinstance(spec.model, ModelReference)}
            self._check(ray, reference)
            files = ray.put(_packed(Path(reference.folder)))
            given: dict[str, Any] = {}
            for spec in specs:
                if spec.key.language not in given:
                    given[spec.key.language] = ray.put(replace(spec, folder=None))
            remote = ray.remote(_work).options(
                num_cpus=self.num_cpus,
                num_gpus=self._gpus(reference),
                memory=self.memory,
                max_retries=self.retries,
                retry_exceptions=False,
            )
            pending = {
                remote.remote(
                    work,
                    (tuple(spec.key), spec.strategy),
                    given[spec.key.language],
                    files,
                    self.num_cpus,
                ): spec.key
                for spec in specs
            }
            nodes = _Nodes(ray)
            logger.info("%d cells on %d nodes of Ray.", len(pending), len(nodes.alive))
            yield from self._finished(ray, pending, nodes)

    def _finished(
        self, ray: Any, pending: dict[Any, Key], nodes: _Nodes
    ) -> Iterator[tuple[Key, Any]]:
        head = _Head(ray.get_runtime_context().gcs_address)
        try:
            while pending:
                done, _ = ray.wait(list(pending), num_returns=1, timeout=_WAIT)
                if head.answers():
                    nodes.look()
                for reference in done:
                    key = pending.pop(reference)
                    try:
                        yield key, ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        yield key, error.cause if isinstance(error.cause, Exception) else error
                    except ray.exceptions.RayError as error:
                        yield key, self._died(key, error)
        finally:
            # An interrupt leaves what is finished; the rest need not be finished for nobody.
            if not head.gone:
                for reference in pending:
                    ray.cancel(reference, force=True)

    def _died(self, key: Key, error: Exception) -> CircuitLensError:
        first = str(error).strip().splitlines()[0]
        return CircuitLensError(
            f"The worker of {key} died, and {self.retries} more after it ({type(error).__name__}: "
            f"{first}): give a cell more memory (memory=…), or look into Ray's log."
        )

    def _gpus(self, reference: ModelReference) -> float:
        return float(reference.device != "cpu") if self.num_gpus is None else self.num_gpus

    def _check(self, ray: Any, reference: ModelReference) -> None:
        """Reject what no node can give, for which Ray would wait.

        Raises:
            InputError: naming it.
        """
        asked = {"CPU": self.num_cpus, "GPU": self._gpus(reference), "memory": self.memory or 0}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(k, 0) >= n for k, n in asked.items()) for node in nodes):
            return
        wanted = ", ".join(f"{n:g} {name}" for name, n in asked.items() if n)
        raise InputError(
            f"No node of the Ray cluster has {wanted}, which a cell asks for: give num_cpus, "
            "num_gpus or memory that a node has."
        )


class _Nodes:
    """The nodes of a cluster, as they come and go."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.alive = self._now()

    def _now(self) -> dict[str, str]:
        return {n["NodeID"]: n["NodeManagerAddress"] for n in self._ray.nodes() if n["Alive"]}

    def look(self) -> None:
        """Say who left and who came."""
        now = self._now()
        for node in self.alive.keys() - now.keys():
            logger.warning(
                "Node %s left the Ray cluster: its cells are run again on the %d that are there.",
                self.alive[node],
                len(now),
            )
        for node in now.keys() - self.alive.keys():
            logger.info("Node %s joined the Ray cluster.", now[node])
        self.alive = now


class _Head:
    """The head node, without which Ray would wait for a minute and then end this process."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._missed = 0
        self.gone = False

    def answers(self) -> bool:
        """Whether it does, by its port: what Ray asks of a head that is gone does not come back.

        Raises:
            CircuitLensError: if that is too often.
        """
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_WAIT).close()
        except OSError as error:
            self._missed += 1
            if self._missed < _PATIENCE:
                return False
            self.gone = True
            raise CircuitLensError(
                f"The head node of the Ray cluster ({self._address}) no longer answers: finished "
                "cells are kept; start the cluster and repeat the call."
            ) from error
        self._missed = 0
        return True


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here is stopped afterwards.

    Raises:
        InputError: if it is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("executor='ray' needs Ray: pip install 'circuitlens[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Nobody looks at it, and it takes a port.
        options["include_dashboard"] = False
    elif address != "auto":
        _reachable(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"There is no Ray cluster at {address!r} ({str(error).splitlines()[0]}): start one "
                "with ray start --head, and give its address."
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"No Ray cluster answers at {address!r}: give the HOST:PORT that ray start --head "
            "prints, or auto on one of its nodes."
        ) from error


def _packed(folder: Path) -> Files:
    """The files of a model, as Ray shares them between the workers of a node."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): np.fromfile(path, dtype=np.uint8) for path in paths}


def _unpacked(reference: ModelReference, files: Files) -> ModelReference:
    """The model on this machine's disk, written by the first worker that needs it."""
    if Path(reference.folder).is_dir():  # the driver's own machine
        return reference
    folder = Path(tempfile.gettempdir()) / f"circuitlens-{reference.fingerprint}"
    with FileLock(f"{folder}.lock"):
        whole = folder / ".whole"
        if not whole.is_file():
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                content.tofile(folder / name)
            whole.touch()
    return replace(reference, folder=str(folder))


def _work(
    work: Callable[[CellSpec], Any],
    own: tuple[tuple[Any, ...], Any],
    given: CellSpec,
    files: Files,
    cpus: int,
) -> Any:
    """Run one cell; what a worker of Ray does.

    Args:
        work: what to run.
        own: the cell's key and strategy; all else is common to the cells of a language.
        given: a cell of the same language.
        files: of the model.
        cpus: number of threads.
    """
    key, strategy = own
    assert isinstance(given.model, ModelReference)
    torch.set_num_threads(cpus)
    model = _unpacked(given.model, files)
    if model.device != "cpu":
        # Ray lets a worker see its own GPUs only.
        model = replace(model, device="cuda:0")
    return work(replace(given, key=Key(*key), strategy=strategy, model=model))
