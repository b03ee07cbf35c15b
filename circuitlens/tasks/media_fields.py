"""Fields of examples that are sounds or images, and their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from circuitlens.errors import InputError
from circuitlens.models.features import Features
from circuitlens.models.media import media_value
from circuitlens.tasks.examples import Example

__all__ = ["HasMedia", "has_media", "joined", "read_media"]

Rows = tuple[tuple[int, ...], ...]


@runtime_checkable
class HasMedia(Protocol):
    """What encodes sounds and images: a :class:`circuitlens.HookedModel`."""

    @property
    def takes_media(self) -> bool:
        """Whether it takes more than text."""
        ...

    def placeholder(self, name: str) -> str:
        """The token that stands for a sound or an image."""
        ...

    def features(
        self, ids: Sequence[int], given: Mapping[str, Any], where: str
    ) -> tuple[tuple[int, ...], Features]:
        """Expand placeholders and encode what they stand for."""
        ...


def has_media(name: str, examples: Sequence[Example], media: HasMedia | None, where: str) -> bool:
    """Whether a field has sounds or images, which a model of text cannot read.

    Raises:
        InputError: if it cannot, or some examples have texts there.
    """
    texts = [example for example in examples if name in example.texts]
    if media is None or not media.takes_media:
        if len(texts) == len(examples):
            return False
        raise InputError(
            f"The examples of {where} have the field {name!r}, and the model takes text only: load "
            f"a model with an encoder for it, or leave {{{name}}} out of the template."
        )
    if texts:
        raise InputError(
            f"Example {texts[0].id} ({where}) has the {name} {texts[0].fields[name]!r}, which is "
            "no file: check the path, which may be relative to the data file."
        )
    return True


def _find_file(text: str, folder: Path | None = None) -> Path | str:
    """The file of that name, in a folder or the working directory; else the text as it is."""
    for path in ((folder or Path()) / text, Path(text)):
        try:
            if text and path.is_file():
                return path
        except OSError:  # no name of a file can be so long
            return text
    return text


def read_media(name: str, value: Any, where: str, folder: Path | None = None) -> Any:
    """A sound or image of a row: the name of a file is looked up, anything else is read.

    Raises:
        InputError: for what is neither.
    """
    if isinstance(value, str):
        return _find_file(value.strip(), folder)
    return media_value(name, value, where)


def joined(rows: Sequence[Rows], features: Sequence[tuple[Features, ...]]) -> tuple[Features, ...]:
    """Features of these examples, then those; a prompt of text has none, but as many rows.

    Text among sounds occurs in replay.
    """
    if not any(features):
        return ()
    width = next(iter(chain(*features))).values.shape[-1]

    def of(tokens: Rows, own: tuple[Features, ...]) -> Iterator[Features]:
        for row in () if own else tokens:
            yield Features(torch.zeros(len(row), width), torch.zeros(len(row), dtype=torch.bool))
        yield from own

    return tuple(chain(*map(of, rows, features)))
