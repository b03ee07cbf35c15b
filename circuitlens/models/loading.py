"""Loading: weights and tokenizers from the hub or a folder, and what may be given instead."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.errors import InputError
from circuitlens.models.composite import Composite
from circuitlens.models.hooked import HookedModel
from circuitlens.models.inside import check_alike, is_composite, language_model_of
from circuitlens.models.prompt import Prompt
from circuitlens.models.selfcheck import check_hooks
from circuitlens.models.weights import load_processor, load_tokenizer, load_weights, plain_model

__all__ = ["HasLabels", "find_device", "find_dtype", "load_model"]

logger = logging.getLogger(__name__)

_PROBLEM = "single_label_classification"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@runtime_checkable
class HasLabels(Protocol):
    """A task, or whatever else has labels."""

    @property
    def labels(self) -> Mapping[str, Any]:
        """By name."""
        ...


def load_model(
    model: object,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | HasLabels = (),
    processor: Any = None,
    **options: Any,
) -> HookedModel:
    """Load a whole model: see :func:`circuitlens.load`, which also opens adapters."""
    where, kind = find_device(device), find_dtype(dtype)
    names = tuple(labels.labels if isinstance(labels, HasLabels) else labels)
    if isinstance(model, HookedModel):
        given = (tokenizer, where, revision, processor, *names, *options)
        if kind == "auto" and all(value is None for value in given):
            return model
        raise InputError(
            f"{model.name} is a HookedModel already: use it without cl.load, or load what it holds "
            "with other options, cl.load(model.hf, …)."
        )
    if isinstance(model, str | Path):
        _check_options(options)
        hf, new = load_weights(str(model), kind, revision, names, **options)
        elsewhere = "hub" if revision is None else f"revision {revision}"
        origin = "folder" if Path(model).exists() else elsewhere
        if processor is None and tokenizer is None and is_composite(hf.config):
            processor = load_processor(str(model), revision, **options)
        tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        tokenizer = tokenizer or load_tokenizer(str(model), revision, **options)
        hooked = _hooked(hf, tokenizer, processor, str(model), origin)
        hooked.new = new
        hooked.prompt = Prompt.found(Path(model))
    else:
        if options:
            raise InputError(
                f"cl.load takes {next(iter(options))}= for a name or folder, which is loaded "
                "with it, but was given a model in memory: leave it out."
            )
        tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        hooked = _hooked(plain_model(model), tokenizer, processor, labels=names)
        _check_classifier(hooked, names)
    _check_padding(hooked, loaded=isinstance(model, str | Path))
    if where is not None:
        cast(nn.Module, hooked.whole).to(where)
    _check_one_device(hooked.whole)
    # Before anything else, because it checks that heads can be hooked.
    _ = hooked.geometry
    check_hooks(hooked)
    if hooked.composite is not None:
        check_alike(hooked.whole, hooked.hf)
    logger.info("Loaded %r.", hooked)
    return hooked


def _hooked(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    processor: Any,
    name: str = "",
    origin: str = "memory",
    labels: Sequence[str] = (),
) -> HookedModel:
    """The model, or the language model inside it.

    Raises:
        InputError: if there is a processor and nothing that takes more than text.
        UnsupportedModelError: if the language model cannot stand alone.
    """
    inside = language_model_of(hf)
    if inside is None:
        if processor is not None:
            raise InputError(
                f"{type(hf).__name__} takes text only, so a processor serves nothing: leave it out."
            )
        return HookedModel(hf, tokenizer, name, origin, labels)
    if processor is not None and not (callable(processor) and hasattr(processor, "tokenizer")):
        raise InputError(
            f"processor is a {type(processor).__name__}: give what AutoProcessor.from_pretrained "
            "loads, which has a tokenizer and takes text with sounds or images."
        )
    name = name or str(hf.config.name_or_path) or type(hf).__name__
    return HookedModel(inside, tokenizer, name, origin, labels, Composite(hf.eval(), processor))


def _check_options(options: Mapping[str, Any]) -> None:
    """Reject what cannot work before anything is loaded.

    Raises:
        InputError: naming the option and the reason.
    """
    if options.get("trust_remote_code"):
        raise InputError(
            "trust_remote_code=True runs code from the checkpoint, and hooks are built for the "
            "architectures of transformers only: leave it out."
        )
    quantised = ("quantization_config", "load_in_8bit", "load_in_4bit")
    if given := [name for name in quantised if options.get(name)]:
        raise InputError(
            f"{given[0]} packs several weights into one number, so rows and columns no longer "
            "belong to single heads: leave it out, and load in fewer bits with dtype='bfloat16'."
        )


def _check_one_device(hf: PreTrainedModel) -> None:
    """Reject a model whose weights are on several devices, or nowhere.

    Raises:
        InputError: naming the devices.
    """
    places = sorted({str(parameter.device) for parameter in hf.parameters()})
    if "meta" in places:
        raise InputError(
            f"Some weights of {type(hf).__name__} are offloaded (on the meta device), where hooks "
            "find no values: load it on one device that has room, device_map='cpu' or 'cuda:0'."
        )
    if len(places) > 1:
        raise InputError(
            f"The weights of {type(hf).__name__} are spread over {', '.join(places)}: hooks need "
            "one device, device_map='cuda:0'."
        )


def _check_classifier(model: HookedModel, names: Sequence[str]) -> None:
    """Reject names of classes for a model in memory that has none, or another number.

    Raises:
        InputError: saying what to give.
    """
    if names and not model.family.is_classifier:
        raise InputError(
            f"labels names classes, but {type(model.hf).__name__} has no classification head: give "
            "its name or folder, which cl.load can give a new head, or leave labels out."
        )
    if names and model.hf.config.num_labels != len(names):
        raise InputError(
            f"The classification head of {model.name} has {model.hf.config.num_labels} classes, "
            f"but labels names {len(names)} ({', '.join(names)}): name each of them."
        )


def _check_padding(model: HookedModel, *, loaded: bool) -> None:
    """Make sure that a decoder's classification head can tell what is padding.

    Raises:
        InputError: if it cannot, or if the head does not score classes.
    """
    if not model.family.is_classifier:
        return
    config = model.hf.config
    if config.num_labels < 2 or getattr(config, "problem_type", None) not in (None, _PROBLEM):
        raise InputError(
            f"The head of {model.name} is one of {config.problem_type or 'regression'} with "
            f"{config.num_labels} outputs: circuitlens needs a head with one score for each class."
        )
    text = config.get_text_config()
    if not model.family.causal or text.pad_token_id is not None:
        return
    pad = model.tokenizer.pad_token_id if model.has_tokenizer else None
    if loaded and pad is not None:
        text.pad_token_id = pad
        logger.info(
            "%s names no token for padding, by which its head finds the last token: the "
            "tokenizer's is used (%d).",
            model.name,
            pad,
        )
        return
    raise InputError(
        f"{model.name} names no token for padding, by which its classification head finds the last "
        "token of a text: set model.config.pad_token_id (and tokenizer.pad_token) first."
    )


def find_device(device: torch.device | str | None) -> torch.device | None:
    """Return the device of that name.

    Raises:
        InputError: if this machine has none.
    """
    if device is None:
        return None
    cause: Exception | None = None
    try:
        found = torch.device(device)
        # A name can be right, and the device not be there: only this tells.
        torch.empty(0, device=found)
        # Tensors there have no data.
        usable = found.type != "meta"
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        usable, cause = False, error
    if not usable:
        there = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            assert kind is not None
            there += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
        raise InputError(
            f"There is no device {str(device)!r} here: give device={', '.join(there)}, or leave it "
            "out."
        ) from cause
    return found


def find_dtype(dtype: torch.dtype | str) -> torch.dtype | Literal["auto"]:
    """Return the floating-point type of that name.

    Raises:
        InputError: if there is none.
    """
    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in [getattr(torch, name) for name in _DTYPES]:
        raise InputError(
            f"A model cannot be loaded in the dtype {str(dtype)!r}: give one of auto, "
            f"{', '.join(_DTYPES)}."
        )
    return cast(torch.dtype, found)
