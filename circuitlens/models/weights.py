"""Weights and tokenizers from the hub or a folder; nothing random is loaded unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.errors import InputError, UnsupportedModelError, first_line
from circuitlens.models.families import refuse_type, tested_types
from circuitlens.models.geometry import made_by
from circuitlens.models.inside import is_composite
from circuitlens.models.readouts import readout_for
from circuitlens.utils.progress import hushed_transformers

__all__ = ["load_processor", "load_tokenizer", "load_weights", "plain_model"]

logger = logging.getLogger(__name__)

_CLASSIFIER = "ForSequenceClassification"


def plain_model(model: object) -> PreTrainedModel:
    """Return ``model`` if it is a Hugging Face model as Hugging Face builds it.

    Raises:
        InputError: saying what it is instead, and what to give.
    """
    kind = type(model).__name__
    if made_by(model, "transformer_lens"):
        raise InputError(
            f"cl.load got a {kind} of TransformerLens: give the name or folder of its weights, or "
            "the Hugging Face model loaded again (TransformerLens rewires the one it is given)."
        )
    if made_by(model, "peft"):
        remedy = (
            "merge the adapter first, cl.load(model.merge_and_unload(), …)"
            if hasattr(model, "merge_and_unload")
            else "its method cannot be merged into weights, so give the model without it"
        )
        raise InputError(
            f"cl.load got a {kind}, the wrapper that PEFT puts around models: {remedy}."
        )
    if not isinstance(model, PreTrainedModel):
        remedy = "a hub name, a local folder or a transformers.PreTrainedModel"
        # Where torch keeps what it compiles, or trains on several devices.
        for name in ("_orig_mod", "module"):
            if isinstance(getattr(model, name, None), PreTrainedModel):
                remedy = f"the one inside it, cl.load(model.{name}, …)"
        raise InputError(f"cl.load got a {kind}, which is not a Hugging Face model: give {remedy}.")
    _refuse_foreign_parts(model)
    refuse_type(model.config)
    return model


def _refuse_foreign_parts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if made_by(module, "peft"):
            raise InputError(
                f"{path} of {type(model).__name__} is a layer of a PEFT adapter "
                f"({type(module).__name__}): merge the adapter first, and give cl.load what "
                "merge_and_unload() of the PeftModel returns."
            )
        if made_by(module, "transformer_lens"):
            raise InputError(
                f"{path} of {type(model).__name__} is a {type(module).__name__}: TransformerLens "
                "has rewired this model, so load the Hugging Face model again."
            )


def load_weights(
    name: str,
    dtype: torch.dtype | str,
    revision: str | None,
    labels: Sequence[str] = (),
    **options: Any,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a language model, or a model with a classification head.

    Args:
        name: hub name or folder.
        dtype, revision: as of :func:`load`.
        labels: names of classes: asks for a classification head, which is made if the checkpoint
            has none.
        options: for ``from_pretrained``.

    Returns:
        The model, and the names of weights that are new and random.

    Raises:
        InputError: if nothing can be loaded from there, or weights are missing.
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
        config = AutoConfig.from_pretrained(name, revision=revision, **_access(options))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The model {name} could not be loaded ({first_line(error)}); check the name and the "
            "network, or download it elsewhere and give the local folder."
        ) from error
    refuse_type(config)
    if is_composite(config):
        if labels:
            raise InputError(
                f"{name} is a {config.model_type} model, whose language model answers in words: "
                "leave labels out."
            )
        whole, absent = _from_pretrained(
            AutoModelForMultimodalLM, name, config, dtype, revision, options
        )
        return plain_model(whole), _check_missing(name, whole, "", absent, True, ())
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    has_head = saved_as.endswith(_CLASSIFIER)
    auto = readout_for(config, classifier=has_head or bool(labels)).auto_class()
    if type(config) not in auto._model_mapping:
        kind = "classification head" if has_head or labels else "causal language model"
        raise UnsupportedModelError(
            f"{name} is a {config.model_type} model, for which Hugging Face has no {kind}: "
            "circuitlens works on causal language models, on classifiers made of them, and on the "
            f"encoders among the types that it is tested on ({tested_types()})."
        )
    if labels:
        _name_classes(name, config, labels, has_head)
    model, missing = _from_pretrained(auto, name, config, dtype, revision, options)
    # A folder that holds an adapter as well comes with it inside.
    return plain_model(model), _check_missing(name, model, saved_as, missing, has_head, labels)


def _from_pretrained(
    auto: Any,
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    revision: str | None,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """Load weights; name those that were not there."""
    try:
        # A new head begins the same every time, and leaves the caller's random numbers alone.
        with hushed_transformers(warnings=False), torch.random.fork_rng():
            torch.manual_seed(0)
            model, report = auto.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                revision=revision,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"The weights of {name} could not be loaded ({first_line(error)})."
        ) from error
    missing = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    return model, sorted(missing)


def _access(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that say how files are reached, whatever is in them."""
    return {key: options[key] for key in ("token", "cache_dir") if key in options}


def _name_classes(
    name: str, config: PretrainedConfig, labels: Sequence[str], has_head: bool
) -> None:
    """Give the classes of the head their names.

    Raises:
        InputError: if the checkpoint's head has another number of classes.
    """
    if has_head and config.num_labels != len(labels):
        own = ", ".join(map(str, (config.id2label or {}).values()))
        raise InputError(
            f"The classification head of {name} has {config.num_labels} classes ({own}), but "
            f"labels names {len(labels)} ({', '.join(labels)}): name each of them, in their order."
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: n for n, label in enumerate(labels)}


def _check_missing(
    name: str,
    model: PreTrainedModel,
    saved_as: str,
    missing: Sequence[str],
    has_head: bool,
    labels: Sequence[str],
) -> tuple[str, ...]:
    """Reject a model with random weights, unless they are those of a head that was asked for.

    Raises:
        InputError: naming what is missing.
    """
    base = f"{model.base_model_prefix}."
    of_head = [n for n in missing if not n.startswith(base) or ".pooler." in n]
    if not missing:
        return ()
    if labels and not has_head and len(of_head) == len(missing):
        logger.warning(
            "%s has no classification head: a new one for %s was made (%s). It is random: train "
            "it, cl.finetune(model, task).",
            name,
            ", ".join(labels),
            ", ".join(of_head),
        )
        return tuple(of_head)
    what = f"{missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}"
    if len(of_head) == len(missing) and not has_head:
        raise InputError(
            f"{name} ({saved_as or 'a model without a named class'}) has no language-model head "
            f"({what} would be random): load a checkpoint with one, or give this one a "
            "classification head for your labels, cl.load(…, labels=task) (--classifier)."
        )
    if saved_as and not hasattr(transformers, saved_as):
        raise InputError(
            f"{name} was saved as a {saved_as}, a class that transformers does not have: build it "
            "with that class, load its weights, and pass it in memory, cl.load(model, …)."
        )
    raise InputError(
        f"Weights of {type(model).__name__} are missing in {name} and would be random ({what}): "
        "the files are incomplete or of another model; save or download it again."
    )


def load_tokenizer(name: str, revision: str | None, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        InputError: if there is none.
    """
    cause: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **_access(options))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        tokenizer, cause = None, error
    # A folder without tokenizer files does not fail: it yields a tokenizer that knows nothing.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        why = f" ({first_line(cause)})" if cause else ""
        raise InputError(
            f"No tokenizer was found in {name}{why}: save one there (tokenizer.save_pretrained), "
            "or load the model yourself and pass cl.load(model, tokenizer=…)."
        ) from cause
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_processor(name: str, revision: str | None, **options: Any) -> Any:
    """Load the processor of a speech or vision model; ``None`` if there is none.

    Text needs a tokenizer only, so a missing processor is complained of where a prompt has a sound
    or an image.
    """
    try:
        found = AutoProcessor.from_pretrained(name, revision=revision, **_access(options))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        logger.warning(
            "%s has no processor that could be loaded (%s): prompts can have text only.",
            name,
            first_line(error),
        )
        return None
    return found if hasattr(found, "tokenizer") else None
