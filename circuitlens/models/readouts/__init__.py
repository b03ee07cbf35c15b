"""The kinds of readout, one module each: where an answer is read, and what the head is."""

from __future__ import annotations

from transformers import PretrainedConfig

from circuitlens.models.batch import Readout
from circuitlens.models.families import is_encoder
from circuitlens.models.readouts.token import TokenReadout

__all__ = ["DEFAULT", "TokenReadout", "readout_of"]

# Of a causal language model.
DEFAULT: Readout = TokenReadout()


def readout_of(config: PretrainedConfig) -> Readout:
    """Return the readout of a model of this configuration, which knows no labels yet."""
    return TokenReadout(masked=is_encoder(config))
