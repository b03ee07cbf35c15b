"""Files: JSON and safetensors, each with a schema version, written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuitlens.errors import CircuitLensError, InputError
from circuitlens.utils.room import writing_to

__all__ = [
    "RUN_SCHEMA",
    "digest",
    "read_json",
    "read_plain_json",
    "read_tensors",
    "replacing",
    "safe_name",
    "whole",
    "write_json",
    "write_tensors",
]


# Of run.json in the folder of a run, which the run itself writes and figures are drawn from.
RUN_SCHEMA = "circuitlens.run/1"

# Windows takes these for devices, whatever extension follows.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
# File systems allow 255 bytes, and some are needed for what is added to the name.
_LONGEST = 180


def safe_name(name: str) -> str:
    """Return a file name for any text, such as a language; different texts have different names.

    Letters without accents, digits, ``_``, ``-`` and dots between them stay as they are; all other
    bytes are percent-encoded, as in an address. Nothing that comes out leads to another folder, is
    hidden, or has a meaning of its own on Windows. Where a file system does not tell capitals from
    small letters, names that differ only in these still meet.

    Raises:
        InputError: if the text is empty.
    """
    if not name:
        raise InputError("An empty name cannot name a file: give the language a name.")

    def encode(found: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))

    # Windows drops dots at the end, and a dot at the beginning hides a file.
    safe = re.sub(r"[^A-Za-z0-9_.-]|^\.+|\.+\Z", encode, name)
    if _DEVICES.match(safe):
        safe = f"%{ord(safe[0]):02X}{safe[1:]}"
    # Nothing else makes two percent signs in a row.
    return safe if len(safe) <= _LONGEST else f"{safe[: _LONGEST - 18]}%%{digest(safe)}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` that replaces it when the block ends well.

    An interrupt inside the block leaves the old file (or none), never half of a new one.

    Raises:
        InputError: if the disk is full, or the folder may not be written.
    """
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        prefix = f".{path.name}.{os.getpid()}."
        handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        # While what was written so far is still there, as it is what fills the disk.
        with writing_to(path.parent):
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            # mkstemp makes files private; results are ordinary files.
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed left of this file; a checkpoint takes gigabytes."""
    if os.name != "posix":
        return  # where a signal that asks would end the process
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        found = re.fullmatch(r"\.(\d+)\.[a-z0-9_]{8}", left.name.removeprefix(f".{path.name}"))
        if found is None:
            continue
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except OSError:
            continue


def write_json(
    path: Path,
    schema: str,
    content: Mapping[str, Any],
    *,
    compact: bool = False,
    sealed: bool = False,
) -> None:
    """Write ``content`` as JSON with a ``schema`` key, e.g. ``circuitlens.circuit/1``.

    Args:
        path: the file.
        schema: kind and version of the file.
        content: what is written.
        compact: for long tables: a line for every entry, and for every item of an entry that is a
            list of objects, instead of one for every number.
        sealed: with a checksum, so that a number that was changed since is noticed. Not for what
            people write by hand too, such as circuits.
    """
    whole = {"schema": schema, **content}
    if sealed:
        # Of what will be read: keys that are numbers become texts.
        whole["checksum"] = _digest_of_json(json.loads(_json(content)))
    text = _lines(whole) if compact else _json(whole, indent=2)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _json(content: Any, **options: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)


def _lines(content: Mapping[str, Any]) -> str:
    def value(item: Any) -> str:
        if isinstance(item, list) and item and all(isinstance(i, dict) for i in item):
            return "[\n" + ",\n".join(value(i) for i in item) + "\n]"
        return _json(item, separators=(",", ":"))

    return "{\n" + ",\n".join(f"{_json(k)}: {value(v)}" for k, v in content.items()) + "\n}"


def _check_schema(path: Path, found: object, schema: str) -> None:
    if found != schema:
        raise InputError(
            f"{path} has schema {found!r}, but {schema!r} is needed here: "
            "it is another kind of file or was written by another version of circuitlens."
        )


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """Read what :func:`write_json` wrote; the schema is checked and removed."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise InputError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} contains no JSON object, so it is not a circuitlens file.")
    _check_schema(path, content.pop("schema", None), schema)
    # Files of earlier versions have none.
    sealed = content.pop("checksum", None)
    if sealed is not None and sealed != _digest_of_json(content):
        raise InputError(
            f"{path} was changed since it was written (its checksum differs): make it again, or "
            "take it from a backup. If the change was meant, remove the line with the checksum."
        )
    return content


def write_tensors(
    path: Path, schema: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write tensors as safetensors; ``meta`` (JSON) and the schema go into the header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"schema": schema, "meta": json.dumps(meta, ensure_ascii=False, allow_nan=False)}
    header["digest"] = _digest_of(plain, header["meta"])
    with replacing(path) as temporary:
        save_file(plain, str(temporary), metadata=header)


def read_tensors(path: Path, schema: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: the tensors and the ``meta`` object."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            _check_schema(path, header.get("schema"), schema)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a safetensors file ({error}).") from error
    meta = header.get("meta", "")
    # Files of earlier versions have no digest.
    if header.get("digest", known := _digest_of(tensors, meta)) != known:
        raise InputError(
            f"{path} was damaged since it was written (its checksum differs): make it again, or "
            "take it from a backup."
        )
    with whole(path):
        return tensors, json.loads(meta)


def _digest_of_json(content: Any) -> str:
    return digest(_json(content, sort_keys=True))


def _digest_of(tensors: Mapping[str, Tensor], meta: str) -> str:
    return digest(meta, *(part for name in sorted(tensors) for part in (name, tensors[name])))


@contextmanager
def whole(path: str | Path) -> Iterator[None]:
    """Reject a file that lacks something, where it is read in this block.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    try:
        yield
    except CircuitLensError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} is damaged, or was written by another version of circuitlens ({what}): make "
            "it again, or restore it from a backup."
        ) from error


def read_plain_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file of another library, such as a configuration.

    Raises:
        InputError: if it is something else.
    """
    with whole(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__} where an object should be")
        return content


def digest(*parts: str | bytes | Tensor) -> str:
    """Return a short SHA-256 of strings, bytes and tensors (dtype, shape and every bit)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.detach().contiguous().reshape(-1).view(torch.uint8)
            # Not its bytes, which would be a copy.
            sha.update(memoryview(cast(Any, flat.cpu().numpy())))
        else:
            sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\x00")
    return sha.hexdigest()[:16]
