"""Trained tensors from their files, put into a copy of the model that they belong to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from circuitlens.adapt.precision import widen
from circuitlens.adapt.tensor_files import (
    ADAPTER,
    ENTRIES,
    ENTRIES_SCHEMA,
    Trained,
    digest_of_adapter,
)
from circuitlens.adapt.trainable import Trainable, whole_modules_in_float32
from circuitlens.errors import CircuitLensError, InputError, first_line
from circuitlens.models.hooked import HookedModel
from circuitlens.utils.storage import read_plain_json, read_tensors, whole

__all__ = ["restore"]


@torch.no_grad()
def restore(model: HookedModel, folder: Path, trained: Trained) -> Trainable:
    """Apply what :meth:`Trainable.write` wrote to a copy of ``model``.

    Raises:
        InputError: if the folder does not hold ``trained``.
    """
    trained.files(folder)
    copy = model.clone()
    if trained.is_adapter:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        if trained.digest and trained.digest != digest_of_adapter(folder):
            raise InputError(
                f"The adapter in {folder} is damaged, or was changed since it was saved: restore "
                "it from a backup, or run the transfer again."
            )
        adapter = _read_adapter(copy, folder)
        if whole_modules_in_float32(adapter):
            # Its tensors were rounded on their way into modules in 16 bits.
            weights = load_peft_weights(str(folder), device=str(model.device))
            set_peft_model_state_dict(adapter, weights)
        copy.adapter = adapter
        return Trainable(copy)
    widen(copy.hf)
    tensors, _ = read_tensors(folder / ENTRIES, ENTRIES_SCHEMA)
    parameters = dict(copy.hf.named_parameters())
    with whole(folder / ENTRIES):
        for key, values in tensors.items():
            name, _, kind = key.partition(":")
            if kind == "all":
                parameters[name].copy_(values)
            elif not kind:
                where = tensors[f"{name}:where"].to(model.device)
                parameters[name][where] = values.to(parameters[name])
    return Trainable(copy)


def _read_adapter(model: HookedModel, folder: Path) -> Any:
    """Put an adapter that PEFT wrote into a model.

    Raises:
        InputError: if a file is damaged, tensors are missing, or they do not fit the model.
    """
    from peft import PeftModel

    import circuitlens.adapt.headslice  # noqa: F401  (makes its method known to PEFT)

    read_plain_json(folder / ADAPTER[0])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            # PEFT warns only, and what is missing would be random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(cast(Any, model.hf), str(folder))
    except CircuitLensError:
        raise
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, Warning) as error:
        raise InputError(
            f"The adapter in {folder} ({', '.join(ADAPTER)}) is damaged, or is not for this model "
            f"({first_line(error)}): restore it from a backup, or load it with its own model."
        ) from error
