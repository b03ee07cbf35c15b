"""Loading: weights and tokenizers from the hub or a folder, and what may be given instead."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.errors import InputError, UnsupportedModelError, first_line
from circuitlens.models.families import tested_types
from circuitlens.models.geometry import made_by
from circuitlens.models.hooked import HookedModel
from circuitlens.models.readouts import readout_of
from circuitlens.models.selfcheck import check_hooks
from circuitlens.utils.progress import hushed_transformers

__all__ = ["find_device", "find_dtype", "load", "load_tokenizer", "load_weights", "plain_model"]

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(
    model: str | Path | PreTrainedModel | HookedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> HookedModel:
    """Load a language model for circuit work.

    Encoders such as BERT come with their masked-language-model head. On a few random tokens the
    hooked view is compared with Hugging Face's, which takes three small forward passes.

    Args:
        model: a hub name, a local folder, or a model in memory (taken as it is, not copied).
        tokenizer: needed only for a model in memory, and only where text is encoded; for a name
            or a folder it overrides the tokenizer found there.
        dtype: float32, bfloat16, float16 or float64, or ``"auto"`` for the checkpoint's own. A
            model in memory keeps its type.
        device: where to put the weights; the default leaves them where loading put them.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: if nothing can be loaded from there, no tokenizer is found, there is no such
            device or type, or ``model`` is wrapped or rewired by another library.
        UnsupportedModelError: if the model has no attention heads that can be hooked, or its hooks
            fail the self-check.
    """
    where, kind = find_device(device), find_dtype(dtype)
    if isinstance(model, HookedModel):
        if tokenizer is None and where is None and revision is None and kind == "auto":
            return model
        raise InputError(
            f"{model.name} is a HookedModel already: use it without cl.load, or load what it holds "
            "with other options, cl.load(model.hf, …)."
        )
    if isinstance(model, str | Path):
        hf = load_weights(str(model), kind, revision)
        elsewhere = "hub" if revision is None else f"revision {revision}"
        origin = "folder" if Path(model).exists() else elsewhere
        tokenizer = tokenizer or load_tokenizer(str(model), revision)
        hooked = HookedModel(hf, tokenizer, str(model), origin)
    else:
        hooked = HookedModel(plain_model(model), tokenizer)
    if where is not None:
        hooked.hf.to(where)
    # Before anything else, because it checks that heads can be hooked.
    _ = hooked.geometry
    check_hooks(hooked)
    logger.info("Loaded %r.", hooked)
    return hooked


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


def plain_model(model: object) -> PreTrainedModel:
    """Return ``model`` if it is a Hugging Face model as Hugging Face builds it.

    Raises:
        InputError: saying what it is instead, and what to give.
    """
    kind = type(model).__name__
    if made_by(model, "transformer_lens"):
        raise InputError(
            f"cl.load got a {kind} of TransformerLens: give the name or folder of its weights, or "
            "the Hugging Face model loaded anew (TransformerLens rewires the one it is given)."
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
        raise InputError(f"cl.load got a {kind}, which is no Hugging Face model: give {remedy}.")
    _refuse_foreign_parts(model)
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
                "has rewired this model, so load the Hugging Face model anew."
            )


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
    auto = readout_of(config).auto_class()
    if type(config) not in auto._model_mapping:
        raise UnsupportedModelError(
            f"{name} is a {config.model_type} model, for which Hugging Face has no causal "
            "language model: circuitlens works on these, and on the encoders among the types that "
            f"it is tested on ({tested_types()})."
        )
    try:
        with hushed_transformers():
            model = auto.from_pretrained(name, dtype=dtype, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The weights of {name} could not be loaded ({first_line(error)})."
        ) from error
    # A folder that holds an adapter as well comes with it inside.
    return plain_model(model)


def load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        InputError: if there is none.
    """
    cause: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
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
