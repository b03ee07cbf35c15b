"""What every result records about its origin."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Provenance", "library_versions", "machine", "without_folder"]

_LIBRARIES = ("circuitlens", "torch", "transformers", "transformer-lens", "peft", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers can depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def machine() -> dict[str, str]:
    """What else the last digits of numbers depend on: threads, instructions, accelerator.

    Sums are made in another order with other numbers of threads, and a training turns the last
    digit into another circuit.
    """
    import torch

    found = {"threads": str(torch.get_num_threads())}
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found["accelerator"] = str(kind)
        if kind is not None and kind.type == "cuda":
            found["accelerator"] = torch.cuda.get_device_name()
    return found


def without_folder(name: str) -> str:
    """A model's name for others: of a folder on this machine its last part."""
    path = Path(name)
    return path.name if path.is_absolute() or path.is_dir() else name


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from: enough to make it again and to see what it was made with.

    Attributes:
        model: name or folder of the model.
        model_fingerprint: SHA-256 (16 hex digits) of all weights.
        task: task name with its language, such as ``nusax/indonesian``.
        data_fingerprint: SHA-256 (16 hex digits) of ids, texts, labels and pools.
        seed: the seed everything random was derived from.
        settings: the arguments of the call.
        versions: library versions.
        machine: threads, instructions and accelerator of the process; empty in older results.
    """

    model: str
    model_fingerprint: str
    task: str
    data_fingerprint: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)
    machine: dict[str, str] = field(default_factory=machine)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Provenance:
        """Rebuild what :meth:`to_dict` returned."""
        return cls(**{"machine": {}, **content})
