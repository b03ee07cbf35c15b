"""Tokens as characters that people can read.

Vocabularies of bytes write a letter of Ethiopic or Javanese script as three signs of Latin-1, and
may split it between tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

__all__ = ["bytes_of", "of_bytes", "readable"]

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each sign of a byte-level vocabulary stands for (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    signs = {chr(b): b for b in printable}
    return signs | {chr(256 + n): b for n, b in enumerate(others)}


def bytes_of(piece: str) -> bytes | None:
    """Bytes of a piece of a byte-level vocabulary; ``None`` if it has other signs."""
    signs = _byte_of()
    if not all(sign in signs for sign in piece):
        return None
    return bytes(signs[sign] for sign in piece)


def of_bytes(pieces: Sequence[str]) -> list[bytes] | None:
    """Bytes of the pieces of a byte-level vocabulary; ``None`` if they are of another kind."""
    if not any("Ġ" in p or "Ċ" in p for p in pieces) or any("▁" in p for p in pieces):
        return None
    found = [bytes_of(piece) for piece in pieces]
    known = [part for part in found if part is not None]
    return known if len(known) == len(found) else None


def readable(pieces: Sequence[bytes]) -> list[str]:
    """Text of tokens that are bytes.

    A character that is split between tokens stands in each of them, numbered: አ₁, አ₂. Bytes that
    are no character are shown as such: <E1 8A>.
    """
    whole = b"".join(pieces)
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    found = [""] * len(pieces)
    # Bytes that are no character, until their run ends.
    stray = [b""] * len(pieces)

    def add(number: int, text: str) -> None:
        if stray[number]:
            found[number] += f"<{stray[number].hex(' ').upper()}>"
            stray[number] = b""
        found[number] += text

    start = 0
    while start < len(whole):
        length = _length(whole[start:])
        part = whole[start : start + max(length, 1)]
        owners = list(dict.fromkeys(owner[start : start + len(part)]))
        if not length:
            stray[owners[0]] += part
        elif len(owners) == 1:
            add(owners[0], part.decode())
        else:
            for number, one in enumerate(owners, start=1):
                add(one, part.decode() + str(number).translate(_SUBSCRIPTS))
        start += len(part)
    for number in range(len(pieces)):
        add(number, "")
    return found


def _length(rest: bytes) -> int:
    """Bytes of the character that begins here; 0 if none does."""
    for length in range(1, 5):
        try:
            rest[:length].decode()
        except UnicodeDecodeError:
            continue
        return length if len(rest) >= length else 0
    return 0
