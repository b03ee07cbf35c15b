"""The kinds of readout, one module each: where an answer is read, and what the head is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from circuitlens.models.batch import Readout
from circuitlens.models.families import family_of, is_encoder
from circuitlens.models.readouts.classifier import ClassifierReadout, is_unnamed
from circuitlens.models.readouts.sequence import SequenceReadout
from circuitlens.models.readouts.token import TokenReadout

__all__ = [
    "DEFAULT",
    "ClassifierReadout",
    "SequenceReadout",
    "TokenReadout",
    "is_unnamed",
    "readout_for",
    "readout_of",
]

# Of a causal language model.
DEFAULT: Readout = TokenReadout()


def readout_of(hf: PreTrainedModel, names: Sequence[str] = ()) -> Readout:
    """Return the readout of a model, which knows no labels yet.

    Args:
        hf: the model.
        names: of the classes of a classification head, in place of its own.
    """
    family = family_of(hf)
    if not family.is_classifier:
        return TokenReadout(masked=is_encoder(hf.config))
    config: Any = hf.config
    own = tuple(str(config.id2label[n]) for n in range(config.num_labels))
    pad = config.get_text_config().pad_token_id
    return ClassifierReadout(tuple(names) or own, family.pooled, pad if family.causal else None)


def readout_for(config: PretrainedConfig, *, classifier: bool) -> Readout:
    """Return a readout of the kind that a model of this configuration has, for its class."""
    return ClassifierReadout() if classifier else TokenReadout(masked=is_encoder(config))
