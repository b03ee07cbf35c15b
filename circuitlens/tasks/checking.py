"""Checks of examples against the prompt of a task."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from circuitlens.errors import InputError
from circuitlens.models.media import MEDIA, Audio, media_value
from circuitlens.models.prompt import Prompt, template_fields
from circuitlens.tasks.examples import Example

__all__ = ["check_examples"]


def check_examples(
    examples: Sequence[Example], prompt: Prompt, labels: Collection[str], where: str
) -> None:
    """Reject examples that a task cannot ask about.

    Args:
        examples: to check.
        prompt: names the fields that each one needs.
        labels: that there are.
        where: what to call them in errors.

    Raises:
        InputError: naming the first one that lacks a field, has something else than a text, sound
            or image there, an empty text, or another label.
    """
    fields = prompt.fields
    # A choice is text, whatever it is called.
    seen = {name for name in template_fields(prompt.template) if name in MEDIA}
    media = seen.difference(prompt.choices)
    texts = [name for name in fields if name not in media]
    for example in examples:
        if missing := [name for name in fields if name not in example.fields]:
            raise InputError(
                f"Example {example.id} ({where}) has no field {missing[0]!r}, which the "
                f"template {prompt.template!r} needs; it has {sorted(example.fields)}."
            )
        if other := [name for name in texts if not isinstance(example.fields[name], str)]:
            raise InputError(
                f"Example {example.id} ({where}) has the {other[0]} "
                f"{example.fields[other[0]]!r}, which is not a string: give its text."
            )
        for name in media:
            if not isinstance(value := example.fields[name], str | Audio):
                media_value(name, value, f"Example {example.id} ({where})")
        own = example.texts
        if empty := [name for name in fields if name in own and not own[name].strip()]:
            raise InputError(
                f"Example {example.id} ({where}) has an empty {empty[0]}: remove the row."
            )
        if example.label not in labels:
            raise InputError(
                f"Example {example.id} ({where}) has the label {example.label!r}, which is "
                f"not one of {list(labels)}."
            )
