"""Weights and tokenizers from the hub or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.bridging import first_line
from circuitlens.errors import InputError, UnsupportedModelError
from circuitlens.families import is_encoder, tested_types
from circuitlens.progress import hush_transformers

__all__ = ["load_tokenizer", "load_weights"]


def load_weights(name: str, dtype: torch.dtype | str, revision: str | None) -> PreTrainedModel:
    """Load a causal language model, or an encoder with its masked-language-model head.

    Raises:
        InputError: if nothing can be loaded from there.
        UnsupportedModelError: for models of other kinds.
    """
    folder = Path(name)
    looks_local = folder.exists() or name.startswith((".", "/", "~"))
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise InputError(
            f"The model folder {name} {what}: give a folder written by save_pretrained, "
            "or a hub name such as Qwen/Qwen2.5-0.5B."
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The model {name} could not be loaded ({first_line(error)}); check the name and the "
            "network, or download it elsewhere and give the local folder."
        ) from error
    auto = AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise UnsupportedModelError(
            f"{name} is a {config.model_type} model, for which Hugging Face has no causal "
            "language model: circuitlens works on these, and on the encoders among the types that "
            f"it is tested on ({tested_types()})."
        )
    hush_transformers()
    try:
        model = auto.from_pretrained(name, dtype=dtype, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The weights of {name} could not be loaded ({first_line(error)})."
        ) from error
    return cast(PreTrainedModel, model)


def load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        InputError: if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError):
        tokenizer = None
    # A folder without tokenizer files does not fail: it yields a tokenizer that knows nothing.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(
            f"No tokenizer was found in {name}: save one there (tokenizer.save_pretrained), or "
            "load the model yourself and pass cl.load(model, tokenizer=…)."
        )
    return cast(PreTrainedTokenizerBase, tokenizer)
