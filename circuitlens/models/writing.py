"""Writing the weights of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from circuitlens.utils.progress import hushed_transformers
from circuitlens.utils.room import writing_to

__all__ = ["write_weights"]


def write_weights(hf: PreTrainedModel, folder: Path, labels: Sequence[str] = ()) -> None:
    """Write weights and configuration the Hugging Face way.

    Args:
        hf: the model.
        folder: where to.
        labels: names of the classes of its head, in place of its own. The file keeps them; the
            model in memory stays as its owner has it.
    """
    own = hf.config.id2label, hf.config.label2id
    if labels:
        hf.config.id2label = dict(enumerate(labels))
        hf.config.label2id = {name: n for n, name in enumerate(labels)}
    try:
        with hushed_transformers(), writing_to(folder):
            hf.save_pretrained(folder)
    finally:
        if labels:
            hf.config.id2label, hf.config.label2id = own
