"""The files of trained tensors: PEFT's of an adapter, or ours of entries; and a note of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuitlens.errors import InputError
from circuitlens.utils.storage import digest, read_json, read_plain_json, whole, write_json

__all__ = [
    "ADAPTER",
    "ENTRIES",
    "ENTRIES_SCHEMA",
    "NOTE",
    "NOTE_SCHEMA",
    "TENSOR_FILES",
    "Trained",
    "digest_of_adapter",
]

ENTRIES_SCHEMA = "circuitlens.weights/2"
NOTE_SCHEMA = "circuitlens.trained/1"
NOTE = "trained.json"
ENTRIES = "weights.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Every file that trained tensors may be in. A new result replaces those of old versions of PEFT
# too, though a pickle is never read.
TENSOR_FILES = (*ADAPTER, "adapter_model.bin", ENTRIES)


@dataclass(frozen=True)
class Trained:
    """What the trained tensors in a folder are.

    Attributes:
        kind: ``"entries"`` of the weights, or the method of a PEFT adapter (``"headslice"``,
            ``"lora"``).
        origin: :attr:`HookedModel.origin` of the weights that they belong to; empty where it was
            not recorded.
        dtype: type of those weights, such as ``"bfloat16"``; empty where it was not recorded.
        checkpoint: folder of those weights on this machine, if they came from one. It is not
            published: adapters that are uploaded name a base on the hub, or none.
        digest: of an adapter's tensors and of what its configuration makes of them; empty where it
            was not recorded. Entries of the weights have one in their own file.
    """

    kind: str
    origin: str = ""
    dtype: str = ""
    checkpoint: str = ""
    digest: str = ""

    @property
    def is_adapter(self) -> bool:
        """Whether they are a PEFT adapter."""
        return self.kind != "entries"

    @classmethod
    def found(cls, folder: Path) -> Trained:
        """What :meth:`Trainable.write` wrote, or a result that does not say: told by the files."""
        if (folder / NOTE).is_file():
            with whole(folder / NOTE):
                return cls.from_dict(read_json(folder / NOTE, NOTE_SCHEMA))
        config = folder / ADAPTER[0]
        if not config.is_file():
            return cls("entries")
        with whole(config):
            return cls(str(read_plain_json(config)["peft_type"]).lower())

    def files(self, folder: Path) -> list[str]:
        """Names of their files in ``folder``.

        Raises:
            InputError: if they are not there.
        """
        names = ADAPTER if self.is_adapter else (ENTRIES,)
        present = [name for name in names if (folder / name).is_file()]
        if len(present) < (2 if self.is_adapter else 1):
            what = "adapter" if self.is_adapter else ENTRIES
            raise InputError(
                f"{folder} no longer has the trained tensors of this result (its {what}): "
                "run the transfer again."
            )
        return present

    def write(self, folder: Path) -> None:
        """Write the note that :meth:`found` reads."""
        write_json(folder / NOTE, NOTE_SCHEMA, self.to_dict(), sealed=True)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Trained:
        """Rebuild what :meth:`to_dict` returned."""
        return cls(**content)


def digest_of_adapter(folder: Path) -> str:
    """Digest of an adapter, whatever base it names and whatever else is next to it."""
    config = read_plain_json(folder / ADAPTER[0])
    for name in ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode"):
        config.pop(name, None)
    return digest(json.dumps(config, sort_keys=True), (folder / ADAPTER[1]).read_bytes())
