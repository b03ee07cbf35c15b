"""Labels for new texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from circuitlens.errors import MODEL, InputError, check_types
from circuitlens.models.hooked import HookedModel
from circuitlens.models.media import MEDIA
from circuitlens.models.prompt import Prompt
from circuitlens.tasks import Example, Task
from circuitlens.tasks.encoding import encode
from circuitlens.tasks.evaluation import label_scores
from circuitlens.tasks.media_fields import read_media

__all__ = ["predict"]


def predict(
    model: HookedModel,
    texts: str | Sequence[str] | Iterable[Mapping[str, Any]] | pd.DataFrame,
    prompt: Task | Prompt | None = None,
    *,
    batch_size: int = 64,
    folder: Path | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Label new texts.

    Args:
        model: a model that does the task, such as ``result.model`` or what :func:`circuitlens.load`
            makes of a saved result, an adapter, or a fine-tuned model.
        texts: a text or several; where the prompt has several fields, a mapping of them for each
            example, or a data frame with these columns. Sounds and images as in examples of a task;
            a string names a file.
        prompt: the task, or what it asks; by default what the model was trained to answer.
        batch_size: texts per forward pass; the result does not depend on it.
        folder: where files of sounds and images are looked for before the working directory.
        quiet: no progress bar.

    Returns:
        One row per text, in the order given: the ``label``, and the probability of each label among
        them all, ``p(label)`` (softmax over the labels' scores).

    Raises:
        InputError: if the prompt is unknown, there are no texts, one is empty or not a string, or a
            field is missing.
        NotFiniteError: if a score is NaN or infinite.
    """
    check_types("predict", model=(model, HookedModel, MODEL))
    asked = prompt.prompt if isinstance(prompt, Task) else prompt or model.prompt
    if asked is None:
        raise InputError(
            f"{model.name} does not say what it was asked: give the task, "
            "cl.predict(model, texts, task)."
        )
    examples = _examples(texts, asked, folder, model.takes_media)
    encoded = encode(
        examples,
        model.tokenizer,
        asked,
        readout=model.readout,
        context=model.context,
        n_embeddings=model.n_embeddings,
        where="texts",
        media=model,
    )
    scores = label_scores(model, encoded, batch_size=batch_size, quiet=quiet)
    labels = list(asked.labels)
    shares = scores.double().softmax(1)
    found: dict[str, Any] = {"label": [labels[i] for i in torch.argmax(scores, 1).tolist()]}
    found |= {f"p({label})": shares[:, n].numpy() for n, label in enumerate(labels)}
    return pd.DataFrame(found)


def _examples(texts: Any, prompt: Prompt, folder: Path | None, takes_media: bool) -> list[Example]:
    fields = list(dict.fromkeys(prompt.fields))
    if isinstance(texts, str):
        texts = [texts]
    rows = texts.to_dict("records") if isinstance(texts, pd.DataFrame) else list(texts)
    if not rows:
        raise InputError("There are no texts to label: give at least one.")
    examples = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            if len(fields) > 1:
                raise InputError(
                    f"The prompt has the fields {', '.join(fields)}, but text {number} is one "
                    "string: give a mapping of them for each example, or a data frame."
                )
            row = {fields[0]: row}
        if not isinstance(row, Mapping):
            raise InputError(
                f"Text {number} is a {type(row).__name__}: give strings, or mappings of the fields "
                f"{', '.join(fields)}."
            )
        for name in fields:
            if name not in row:
                raise InputError(
                    f"Text {number} has no field {name!r}, which the prompt needs; it has "
                    f"{', '.join(map(str, row))}."
                )
            if takes_media and name in MEDIA:
                continue
            if not isinstance(row[name], str) or not row[name].strip():
                raise InputError(
                    f"The {name} of text {number} is empty or no string ({row[name]!r}): remove it."
                )
        found = {name: row[name] for name in fields}
        for name in set(MEDIA).intersection(fields) if takes_media else ():
            found[name] = read_media(name, found[name], f"Text {number}", folder)
        examples.append(Example(str(number), found, ""))
    return examples
