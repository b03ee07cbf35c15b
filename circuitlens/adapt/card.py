"""The model card of a transfer, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
from typing import Protocol, cast, runtime_checkable
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from circuitlens.adapt.auto import Decision
from circuitlens.adapt.retention import Retained
from circuitlens.adapt.strategies import STRATEGIES
from circuitlens.adapt.tensor_files import Trained
from circuitlens.circuit import Circuit
from circuitlens.models.hooked import HookedModel
from circuitlens.models.prompt import Prompt
from circuitlens.models.readouts import DEFAULT
from circuitlens.tasks.evaluation import Evaluation
from circuitlens.utils.provenance import Provenance, without_folder
from circuitlens.utils.strangers import as_code, as_markdown

__all__ = ["model_card"]

_BASE = "path/to/base"
_FOLDER = "path/to/this/folder"
_ADAPTER_CODE = """from peft import PeftModel
from transformers import {auto}
{method}
base = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{folder}")"""
_METHOD = """
import circuitlens.adapt.headslice  # makes the adapter's method known to PEFT
"""
_ENTRIES_CODE = """import circuitlens as cl

base = cl.load({base})
result = cl.TransferResult.load("{folder}", base)
model = result.model.hf"""
# What PEFT loads is the language model; this is all of it.
_WHOLE_CODE = _ENTRIES_CODE.replace(".model.hf", ".model.whole")
# What HookedModel.origin says, but for the hub.
_ORIGINS = {
    "": "weights of a model named {}",
    "folder": "the weights in the folder {}",
    "memory": "weights of a model named {} that was given in memory",
    "fine-tuned": "fine-tuned weights, trained from {}",
    "adapted": "weights that an earlier transfer made of {}",
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Adapted with [circuitlens](https://github.com/circuitlens/circuitlens)
([CT-SFT](https://arxiv.org/abs/2601.08146)): {{ trained }}

## How to use

{{ base }}

```python
{{ code }}
```

{{ remarks }}

{{ prompt }}## Circuit

{{ circuit }}

## Data

Trained on the training pool of {{ data }}. The learning rate was chosen on the validation split of
{{ task }}, and the figures below are from its test split, read once.

## Results

| test split | accuracy before | after | macro-F1 before | after | ECE before | after |
|---|---|---|---|---|---|---|
{{ rows }}

ECE is the expected calibration error of the label probabilities (15 bins).

## Licence

No licence is set here. The adapter is a derivative of the base model and of the training data:
read the licences of both before you publish it.

## Provenance

{{ provenance }}
"""


@runtime_checkable
class Described(Protocol):
    """What a card says about a transfer: part of :class:`circuitlens.TransferResult`."""

    @property
    def strategy(self) -> str: ...
    @property
    def heads(self) -> Circuit | None: ...
    @property
    def target_language(self) -> str: ...
    @property
    def source_language(self) -> str | None: ...
    @property
    def target_before(self) -> Evaluation: ...
    @property
    def target_after(self) -> Evaluation: ...
    @property
    def retained(self) -> tuple[Retained, ...]: ...
    @property
    def n_trainable(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def decision(self) -> Decision | None: ...
    @property
    def provenance(self) -> Provenance: ...
    @property
    def model(self) -> HookedModel | None: ...
    @property
    def trained(self) -> Trained | None: ...
    @property
    def prompt(self) -> Prompt | None: ...
    @property
    def is_adapter(self) -> bool: ...


def model_card(result: Described) -> ModelCard:
    """Write the card of a finished transfer.

    It names the base model, what was trained, how to load it, the circuit, data, figures and
    provenance, and says that licences follow from the base model and the data.
    """
    origin = result.provenance
    target = f"{origin.task.split('/')[0]}/{result.target_language}"
    measured = [(target, result.target_before, result.target_after)]
    measured += [(r.name, r.before, r.after) for r in result.retained]
    shown = origin.model if _is_on_hub(result) else without_folder(origin.model)
    name = f"{shown} adapted to {result.target_language} ({result.strategy})"
    data = ModelCardData(
        # The hub would load the trained tensors on top of whatever has this name.
        base_model=origin.model if _is_on_hub(result) else None,
        library_name="peft" if result.is_adapter else "circuitlens",
        tags=["circuitlens", "ct-sft", result.strategy],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=task,
                dataset_name=task,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(after.accuracy, 4),
            )
            for task, _, after in measured
        ],
    )
    heads = result.heads
    rate = f"learning rate {result.learning_rate:g}"
    if not result.learning_rate:
        rate = "left as they were, because no learning rate did better on validation"
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=as_markdown(name),
        trained=f"strategy {as_code(result.strategy)}, "
        f"{result.n_trainable:,} trained entries, {rate}."
        + (f" {as_markdown(result.decision.why)}" if result.decision else ""),
        base=_base(result),
        code=_code(result),
        remarks=_remarks(result),
        prompt=_prompt(result.prompt),
        circuit=(
            "This strategy is not about heads."
            if heads is None
            else f"{len(heads)} of {heads.n_layers * heads.n_heads} heads "
            f"({as_markdown(heads.selection)}): " + (", ".join(map(str, heads)) or "none")
        ),
        data=as_markdown(target) + _mixed_in(result),
        task=as_markdown(target),
        rows="\n".join(_row(*entry) for entry in measured),
        provenance="\n".join(
            f"- {key}: {as_markdown(shown if key == 'model' else value)}"
            for key, value in origin.to_dict().items()
            if value is not None
        ),
    )
    return cast(ModelCard, card)


def _prompt(prompt: Prompt | None) -> str:
    """State what the model is asked, and what its answers mean."""
    if prompt is None:
        return ""
    settings = {name: value for name, value in prompt.to_dict().items() if name != "labels"}
    shown = {**settings, **{f"label {label}": word for label, word in prompt.labels.items()}}
    lines = [
        f"- {as_markdown(name)}: {as_code(json.dumps(v, ensure_ascii=False))}"
        for name, v in shown.items()
    ]
    return (
        "## Prompt\n\nWhat the model is asked, and the answer word of every label (of a "
        "classification head, the class of this name). With it, "
        f"`circuitlens predict {_FOLDER} --in new.csv --out labelled.csv` labels new texts.\n\n"
        + "\n".join(lines)
        + "\n\n"
    )


def _is_on_hub(result: Described) -> bool:
    return result.trained is not None and result.trained.origin == "hub"


def _base(result: Described) -> str:
    """State which weights the trained tensors belong to."""
    name, fingerprint = result.provenance.model, result.provenance.model_fingerprint
    what = "This adapter belongs" if result.is_adapter else "These weights belong"
    if _is_on_hub(result):
        link = f"[{as_markdown(name)}](https://huggingface.co/{quote(name)})"
        return f"{what} to {link} (fingerprint `{fingerprint}`)."
    origin = result.trained.origin if result.trained else ""
    # A card is for others, who have no use for the place of a folder here.
    shown = as_code(without_folder(name))
    to = _ORIGINS.get(origin, f"the weights of {{}}, {origin}").format(shown)
    return (
        f"{what} to {to} (fingerprint `{fingerprint}`). On any others it would give wrong answers; "
        f"put a folder with these weights, written by `save` or `save_pretrained`, for `{_BASE}`."
    )


def _code(result: Described) -> str:
    """Write the code that loads what the folder holds."""
    base, readout = f'"{_BASE}"', DEFAULT
    if result.model is not None:
        readout = result.model.readout
        if _is_on_hub(result):
            # The checkpoint's own type may be another one.
            dtype = result.trained.dtype if result.trained else ""
            base = json.dumps(result.provenance.model) + (f', dtype="{dtype}"' if dtype else "")
    template = _ADAPTER_CODE if result.is_adapter else _ENTRIES_CODE
    if result.model is not None and result.model.takes_media:
        template = _WHOLE_CODE
    return template.format(
        auto=readout.auto_class().__name__,
        method=_METHOD if result.trained and result.trained.kind == "headslice" else "",
        base=base,
        folder=_FOLDER,
    )


def _remarks(result: Described) -> str:
    """Say what the code leaves open."""
    if result.is_adapter:
        return (
            f"`{_FOLDER}` may be a name on the hub. PEFT does not compare weights: "
            "`circuitlens.load(…).fingerprint()` of the base must be the fingerprint above."
        )
    return (
        f"If they are on the hub, `huggingface_hub.snapshot_download` returns `{_FOLDER}`. "
        "The folder contains changed entries only, which `transformers` cannot load by itself; "
        '`result.model.save("merged")` writes a folder that it can.'
    )


def _mixed_in(result: Described) -> str:
    """Name the source examples among the training data, if there were any."""
    replay = result.provenance.settings.get("replay", 0)
    strategy = STRATEGIES.get(result.strategy)
    gradual = strategy is not None and strategy.gradual
    if not (result.source_language and (replay or gradual)):
        return ""
    each = f"{replay:g} for each of the target's"
    how = f"in stages, fewer in each, down to {each if replay else 'none'}"
    if not gradual:
        how = f"up to {each}"
    source = as_markdown(result.retained[0].name)
    return f" and on examples from the training pool of {source} ({how})"


def _row(name: str, before: Evaluation, after: Evaluation) -> str:
    pairs = (
        (before.accuracy, after.accuracy),
        (before.macro_f1, after.macro_f1),
        (before.calibration_error, after.calibration_error),
    )
    cells = [f"{value:.3f}" for pair in pairs for value in pair]
    return f"| {as_markdown(name)} | " + " | ".join(cells) + " |"
