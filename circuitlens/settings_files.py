"""Settings files of runs: every option of ``circuitlens run`` is a key; a recipe is such a file.

A file is turned into the options that it stands for before the command line is read, so that both
mean the same, and options on the command line override it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from circuitlens.adapt.options import TRANSFER, TrainingOptions
from circuitlens.cli_options import run_options
from circuitlens.errors import InputError
from circuitlens.run_settings import RunSettings

__all__ = ["RECIPES", "expanded", "flags_of", "settings_file"]

_FOLDER = Path(__file__).parent / "recipes"
RECIPES = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
_SOURCES = ("--config", "--recipe")
# Options for where transfers are run, which are not settings of the run.
_WHERE = ("executor", "address", "cpus", "gpus")


def _options() -> dict[str, tuple[str, str | None]]:
    """By name of the setting: its flag, and the flag that denies it, if there is one."""
    found: dict[str, tuple[str, str | None]] = {}
    for option in run_options():
        # Where typer puts the names of an option.
        given = get_args(option.annotation)[1]
        yes, _, no = str(given.default).partition("/")
        found[option.name] = yes, no or None
    return found | {name: (f"--{name}", None) for name in _WHERE}


def expanded(arguments: Sequence[str]) -> list[str]:
    """Replace ``--config FILE`` and ``--recipe NAME`` of a run by what they stand for.

    Raises:
        InputError: for a missing file or unknown recipe, a file that cannot be read, or an unknown
            key, with the nearest known one.
    """
    if not arguments or arguments[0] != "run":
        return list(arguments)
    rest: list[str] = []
    files: list[Path] = []
    words = iter(arguments[1:])
    for word in words:
        flag, given, value = word.partition("=")
        if flag not in _SOURCES:
            rest.append(word)
            continue
        value = value if given else next(words, "")
        if not value:
            raise InputError(f"{flag} needs a value: give the file, or the name of a recipe.")
        files.append(Path(value) if flag == "--config" else _recipe(value))
    own = {word.partition("=")[0] for word in rest if word.startswith("--")}
    before: list[str] = []
    for path in files:
        before += flags_of(_read(path), str(path), own)
    return ["run", *before, *rest]


def _recipe(name: str) -> Path:
    if name not in RECIPES:
        raise InputError(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    return _FOLDER / f"{name}.yaml"


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(f"There is no settings file {path}: check --config.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The settings file {path} is not valid YAML ({error}).") from error
    if not isinstance(content, Mapping):
        raise InputError(f"The settings file {path} must map options to values, such as epochs: 5.")
    return content


def flags_of(content: Mapping[str, Any], where: str, own: set[str] | None = None) -> list[str]:
    """The options that a mapping stands for, except those that were given already.

    Raises:
        InputError: for an unknown key, or a value that no option can have.
    """
    flags = {pair[0].removeprefix("--"): pair for pair in _options().values()}
    found: list[str] = []
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in flags:
            near = difflib.get_close_matches(name, flags, 1)
            raise InputError(
                f"{where} has the key {key!r}, which is not an option of circuitlens run"
                + (f": did you mean {near[0]!r}?" if near else "; see circuitlens run --help.")
            )
        yes, no = flags[name]
        if not (own or set()) & {yes, no}:
            found += _words(yes, no, value, f"{key!r} of {where}")
    return found


def _words(yes: str, no: str | None, value: Any, what: str) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, bool):
        if value or no:
            yield yes if value or no is None else no
        return
    if isinstance(value, Mapping):
        value = [
            f"{k}={v}" for k, vs in value.items() for v in (vs if isinstance(vs, list) else [vs])
        ]
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, str | int | float):
            raise InputError(f"{what} has the value {one!r}: give a text or a number, or a list.")
        # With "=", so that a value may begin with a dash.
        yield f"{yes}={one}"


def settings_file(settings: RunSettings) -> str:
    """The settings file that repeats a run; defaults are left out."""
    import yaml

    flags = {name: pair[0].removeprefix("--") for name, pair in _options().items()}
    content: dict[str, Any] = {}

    def note(name: str, value: Any, usual: Any) -> None:
        if value != usual and name in flags:
            content[flags[name]] = _plain(value)

    for field in fields(RunSettings):
        note(field.name, getattr(settings, field.name), field.default)
    first = settings.competence_options({})
    usual = RunSettings(settings.model, settings.task, training=settings.training)
    for field in fields(TrainingOptions):
        if field.name == "seed":
            continue
        if field.name != "learning_rate":
            note(field.name, getattr(settings.training, field.name), getattr(TRANSFER, field.name))
        default = getattr(usual.competence_options({}), field.name)
        note(f"finetune_{field.name}", getattr(first, field.name), default)
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
