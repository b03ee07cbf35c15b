"""The options of ``circuitlens run``, made from the fields of the settings and their documentation.

A field of :class:`RunSettings` is an option of the same name; one of :class:`TrainingOptions` is
an option of the transfer, and behind ``--finetune-`` one of the competence stage.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from circuitlens import catalogue
from circuitlens.adapt.options import COMPETENCE, TRANSFER, TrainingOptions
from circuitlens.errors import InputError
from circuitlens.run_settings import CHOICES, PEFT_FILE, RunSettings, wants_share_kept

__all__ = [
    "FigureFormat",
    "documentation",
    "pairs",
    "parsed",
    "run_options",
    "settings_of",
    "size_of",
    "takes",
    "width_of",
]


class FigureFormat(StrEnum):
    """File formats of figures."""

    PDF = "pdf"
    SVG = "svg"
    PNG = "png"
    HTML = "html"


# Fields that are given one at a time have a flag in the singular.
_FLAGS = {
    "targets": "--target",
    "labels": "--label",
    "choices": "--choice",
    "columns": "--column",
    "sizes": "--curve-size",
    "strategies": "--strategy",
    "candidates": "--candidate",
    "learning_rates": "--rate",
}
_FINETUNE = {"learning_rate": "--finetune-rate"}
_NOT_HERE = ("training", "finetuning")
# Of trainings; the seed is that of the run.
_TRAINING = [field for field in fields(TrainingOptions) if field.name != "seed"]
_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "str | None": str | None,
    "bool | None": bool | None,
    "int | None": int | None,
    "float | None": float | None,
    "float | int | str": str,
    "tuple[str, ...]": list[str] | None,
    "tuple[float, ...]": list[float] | None,
    "tuple[float | int, ...]": list[str] | None,
    "dict[str, str] | None": list[str] | None,
    "dict[str, Any] | None": list[str] | None,
}


def documentation(kind: type) -> dict[str, str]:
    """What the ``Attributes`` section of a class says about each field."""
    _, _, section = inspect.getdoc(kind).partition("Attributes:\n")  # type: ignore[union-attr]
    section = re.split(r"\n\n|\nRaises:", section)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n      +.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _option(
    field: Field[Any],
    help_: str,
    flag: str,
    default: Any = MISSING,
    shown: str | None = None,
    panel: str | None = None,
) -> inspect.Parameter:
    """An option for a field."""
    kind = _TYPES[str(field.type)]
    if default is MISSING:
        default = inspect.Parameter.empty if field.default is MISSING else field.default
    details: dict[str, Any] = {"help": help_, "rich_help_panel": panel}
    if isinstance(default, tuple):
        # Given options replace the defaults, so these are not what a list begins with.
        shown = shown or ", ".join(map(str, default))
        default = None
    if shown:
        details["show_default"] = shown
    elif default is None or default is False:
        details["show_default"] = False
    if field.name == "strategies":
        details["metavar"] = "NAME"
        details["autocompletion"] = lambda: list(catalogue.strategies())
        details["callback"] = _known_strategies
    elif field.name in CHOICES:
        one = _one_of(field.name)
        kind = list[one] | None if str(field.type).startswith("tuple") else one  # type: ignore[valid-type]
        details["metavar"] = "NAME"
    elif field.name == "task":
        details["autocompletion"] = lambda: list(catalogue.data_sets())
    if kind in (bool, bool | None) and default is not False:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    if default is None and not str(field.type).startswith(("tuple", "dict")):
        kind = kind | None
    if str(field.type) == "float | int | str" and default not in (None, inspect.Parameter.empty):
        default = str(default)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(flag, **details)],
    )


def _one_of(field: str) -> Any:
    """The type of the values that a setting may have, for typer, whose lists take no literals."""
    return StrEnum(field, {value: value for value in CHOICES[field]})


def _known_strategies(names: list[str] | None) -> list[str] | None:
    """Reject names of unknown strategies; files of configurations have their own names."""
    known = CHOICES["strategies"]
    for name in names or ():
        if name not in known and not name.startswith(PEFT_FILE):
            listed = ", ".join(map(repr, known))
            raise typer.BadParameter(f"{name!r} is not one of {listed}, nor {PEFT_FILE}FILE.json.")
    return names


def _flag(name: str, prefix: str = "--") -> str:
    return prefix + name.replace("_", "-")


def _help_of(name: str, text: str) -> str:
    registries = {"method": catalogue.scorers, "strategies": catalogue.strategies}
    if name in registries:
        text += " One of " + ", ".join(registries[name]()) + "."
    elif name in CHOICES:
        text += " One of " + ", ".join(CHOICES[name]) + "."
    elif name == "task":
        text += " Data sets are " + ", ".join(catalogue.data_sets()) + "."
    return _sentence(text)


def run_options(*only: str) -> list[inspect.Parameter]:
    """Options for all settings of a run, or for some, which then have no default."""
    texts, trainings = documentation(RunSettings), documentation(TrainingOptions)
    options = []
    for field in fields(RunSettings):
        if field.name in _NOT_HERE or (only and field.name not in only):
            continue
        text = _help_of(field.name, texts[field.name])
        if str(field.type).startswith(("tuple", "dict")):
            text += " Repeat for several."
        flag = _FLAGS.get(field.name) or _flag(field.name)
        options.append(_option(field, text, flag, None if only else MISSING))
    if only:
        return options
    for field in _TRAINING:
        text = _sentence(re.sub(r" \(``.*", ".", trainings[field.name]))
        if field.name != "learning_rate":
            default = getattr(TRANSFER, field.name)
            flag = _flag(field.name)
            options.append(_option(field, text, flag, default, panel="Training of the transfer"))
        usual = str(getattr(COMPETENCE, field.name))
        if field.name in ("accumulation", "bf16"):
            usual = "as the transfer's"
        flag = _FINETUNE.get(field.name) or _flag(field.name, "--finetune-")
        option = _option(field, text, flag, None, usual, "Training of the competence stage")
        options.append(option.replace(name=f"finetune_{field.name}"))
    return options


def takes(options: Sequence[inspect.Parameter]) -> Callable[[Callable[..., None]], Any]:
    """Give a command that takes ``**values`` these options."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        required = [p for p in options if p.default is inspect.Parameter.empty]
        others = [p for p in options if p.default is not inspect.Parameter.empty]
        parameters = [
            *[p for p in own if p.default is inspect.Parameter.empty],
            *required,
            *others,
            *[p for p in own if p.default is not inspect.Parameter.empty],
        ]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        command.__signature__ = signature.replace(parameters=keyword)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in keyword} | {"return": None}
        return command

    return decorate


def settings_of(values: Mapping[str, Any]) -> RunSettings:
    """Settings from the values of the options.

    Raises:
        InputError: for settings that no run could work with.
    """
    given = {name: value for name, value in values.items() if value is not None}
    own = {field.name: given.pop(field.name) for field in _TRAINING if field.name in given}
    first = {
        field.name: given.pop(f"finetune_{field.name}")
        for field in _TRAINING
        if f"finetune_{field.name}" in given
    }
    settings = RunSettings(**parsed(given), training=TRANSFER.updated(own))
    return replace(settings, finetuning=settings.competence_options(first))


def parsed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn values of options into those of fields; options that were not given are left out.

    Raises:
        InputError: for a size or pair that cannot be read.
    """
    found: dict[str, Any] = {}
    kinds = {field.name: str(field.type) for field in fields(RunSettings)}
    for name, value in values.items():
        if value is None:
            continue
        flag = _FLAGS.get(name) or _flag(name)
        if kinds[name].startswith("dict"):
            found[name] = pairs(value, flag)
        elif kinds[name] == "tuple[float | int, ...]":
            found[name] = tuple(size_of(item, flag) for item in value)
        elif kinds[name].startswith("tuple"):
            found[name] = tuple(str(item) if isinstance(item, StrEnum) else item for item in value)
        elif kinds[name] == "float | int | str":
            found[name] = value if wants_share_kept(value) else size_of(value, flag)
        else:
            found[name] = str(value) if isinstance(value, StrEnum) else value
    return found


def pairs(items: Sequence[str], flag: str) -> dict[str, Any] | None:
    """Read ``name=value`` pairs; a name that comes again has several values."""
    for item in items:
        if "=" not in item:
            raise InputError(f"{flag} takes name=value, but got {item!r}.")
    found: dict[str, Any] = {}
    for name, value in (item.split("=", 1) for item in items):
        if name not in found:
            found[name] = value
        else:
            before = found[name] if isinstance(found[name], tuple) else (found[name],)
            found[name] = (*before, value)
    return found or None


def size_of(text: str, flag: str = "--size") -> int | float:
    """Read a number of heads or a share of them."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise InputError(
            f"{flag} takes a number of heads (8) or a share of them (0.25), but got {text!r}."
        ) from None


def width_of(text: str) -> str | float:
    """Read the width of a figure: millimetres, or a name, which the export checks."""
    try:
        return float(text)
    except ValueError:
        return text
