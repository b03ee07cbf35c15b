"""Opening what people have saved: models, and adapters or results on top of models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.adapt.restoring import restore
from circuitlens.adapt.result import TransferResult
from circuitlens.adapt.tensor_files import Trained
from circuitlens.adapt.trainable import PROMPT
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.models.loading import HasLabels, load_model
from circuitlens.models.prompt import Prompt
from circuitlens.utils.storage import read_plain_json

__all__ = ["load"]

logger = logging.getLogger(__name__)


def load(
    model: str | Path | PreTrainedModel | HookedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | HasLabels = (),
    processor: Any = None,
    **options: Any,
) -> HookedModel:
    """Load a language model, or a model with a classification head, for circuit work.

    A checkpoint of a classifier comes with its head; other encoders such as BERT come with their
    masked-language-model head. A folder that holds an adapter, or a saved
    :class:`circuitlens.TransferResult`, is loaded into the model that it belongs to, merged unless
    that is in 16 bits (:func:`circuitlens.merge`). On a few random tokens the hooked view is
    compared with Hugging Face's, which takes three small forward passes. No weight is ever random
    unless asked for.

    Of a speech or vision model (Qwen2-Audio, Voxtral, LLaVA, …) the language model inside is
    hooked and trained; encoder and projector stay as they are. :attr:`HookedModel.whole` is all of
    it, with the trained weights, and is what :meth:`HookedModel.save` writes.

    Args:
        model: a hub name, a local folder, or a model in memory (used as it is, not copied).
        tokenizer: needed only for a model in memory, and only where text is encoded; for a name
            or a folder it overrides the tokenizer found there.
        dtype: float32, bfloat16, float16 or float64, or ``"auto"`` for the checkpoint's own. A
            model in memory keeps its type.
        device: where to put the weights; the default leaves them where loading put them.
        revision: branch, tag or commit of a hub model.
        labels: names of the classes of a classification head, in their order, or a task that has
            these labels. A checkpoint without such a head gets one, which is random until
            :func:`circuitlens.finetune` trains it.
        processor: of a speech or vision model in memory, if prompts are to have sounds or images;
            for a name or folder it overrides the one found there.
        options: passed on to ``from_pretrained`` of a name or folder, such as ``token``,
            ``cache_dir``, ``attn_implementation``, or ``device_map`` for one device.

    Raises:
        InputError: if nothing can be loaded from there, weights or a tokenizer are missing, there
            is no such device, type or option, or ``model`` is wrapped or rewired by another
            library.
        UnsupportedModelError: if the model has no attention heads that can be hooked, or its hooks
            fail the self-check.
    """
    given: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision, **options}
    given["processor"] = processor
    if isinstance(model, str | Path) and _holds_tensors(folder := Path(model)):
        if labels:
            raise InputError(
                f"{folder} holds trained tensors of a model whose labels are known: leave labels "
                "out."
            )
        return _adapted(folder, tokenizer, given)
    return load_model(model, tokenizer, labels=labels, **given)


def _holds_tensors(folder: Path) -> bool:
    """Whether a folder holds an adapter or a result, and no whole model."""
    names = ("adapter_config.json", "result.json")
    return not (folder / "config.json").is_file() and any((folder / n).is_file() for n in names)


def _adapted(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, given: dict[str, Any]
) -> HookedModel:
    """The model that the tensors of a folder belong to, with them merged in.

    Raises:
        InputError: if the folder does not say which model that is.
    """
    config = folder / "adapter_config.json"
    adapter = read_plain_json(config) if config.is_file() else {}
    result = TransferResult.load(folder) if (folder / "result.json").is_file() else None
    trained = Trained.found(folder) if result is None else result.trained
    # What was uploaded names a checkpoint on the hub; on this machine it may be a folder.
    name = str(adapter.get("base_model_name_or_path") or "")
    if not name and trained is not None:
        name = trained.checkpoint
    if not name and result is not None and trained is not None:
        name = result.provenance.model if trained.origin in ("hub", "folder") else ""
    if not name or trained is None:
        raise InputError(
            f"{folder} holds trained tensors, but not where the weights are that they belong to "
            "(those were in memory): load them, model = cl.load(…), and call "
            f"cl.TransferResult.load({str(folder)!r}, model).model."
        )
    if adapter.get("revision"):
        given["revision"] = adapter["revision"]
    logger.info("%s holds trained tensors (%s) for %s.", folder, trained.kind, name)
    if given["dtype"] == "auto" and trained.dtype:
        # The checkpoint's own may be another one, on which the tensors would not fit.
        given["dtype"] = trained.dtype
    base = load_model(name, tokenizer, **given)
    if result is not None:
        model = TransferResult.load(folder, base).model
        assert model is not None
    else:
        model = restore(base, folder, trained).adapted()
    asked = (adapter.get("auto_mapping") or {}).get(PROMPT)
    if asked and model.prompt is None:
        model.prompt = Prompt.from_dict(asked)
    return model
