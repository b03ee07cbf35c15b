"""Settings have one home: verbs, run settings and the command line take all of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import unchecked
from typer.main import get_command
from typer.testing import CliRunner

import circuitlens as cl
from circuitlens import catalogue
from circuitlens.adapt.options import COMPETENCE, TRANSFER, TrainingKeywords, TrainingOptions
from circuitlens.adapt.strategies import NAMES, STRATEGIES
from circuitlens.cli import app
from circuitlens.cli_options import documentation, settings_of
from circuitlens.run_settings import CHOICES, RunSettings, folder_of
from circuitlens.tasks import data_sets

FIELDS = [field.name for field in fields(TrainingOptions)]
# What a run decides by itself, or for which it has other names.
OF_A_RUN = {
    "model", "task", "baseline", "scores", "circuit", "examples", "checkpoints", "inplace",
    "quiet", "source", "strategy", "rows", "batch_size", "learning_rate", "languages", "out",
    "seeds", "training", "finetuning", "name", "language", "options", "tokenizer",
    # What takes a model in memory, or a function.
    "processor", "monitor", "keep_monitor",
}  # fmt: skip
OTHERWISE = {"strategy": "strategies", "language": "source"}


def flags(command: str = "run") -> dict[str, object]:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {flag: p for p in found.params for flag in p.opts}


def test_names_are_those_of_the_registries():
    assert catalogue.scorers() == cl.METHODS
    assert tuple(catalogue.strategies()) == NAMES
    assert {n: s.description for n, s in STRATEGIES.items()}.items() <= (
        catalogue.strategies().items()
    )
    assert catalogue.data_sets() == {n: d.description for n, d in data_sets().items()}


def test_keywords_are_the_fields_of_the_options():
    assert list(TrainingKeywords.__annotations__) == FIELDS
    assert set(documentation(TrainingOptions)) == set(FIELDS)
    assert set(documentation(RunSettings)) == {field.name for field in fields(RunSettings)}
    for name, text in documentation(TrainingOptions).items():
        assert "``" in text, f"{name} has no name of Hugging Face's"


@pytest.mark.parametrize(
    ("verb", "defaults", "but"),
    [
        (cl.finetune, COMPETENCE, set()),
        (cl.transfer, TRANSFER, {"learning_rate"}),
        (cl.compare, TRANSFER, {"learning_rate", "seed"}),
    ],
)
def test_verbs_show_every_field_with_its_default(verb, defaults, but):
    shown = inspect.signature(verb).parameters
    assert set(FIELDS) - but <= set(shown)
    for name in set(FIELDS) - but:
        assert shown[name].default == getattr(defaults, name)
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert "options" not in shown


@pytest.mark.parametrize(
    "verb",
    [
        cl.load,
        cl.load_task,
        cl.finetune,
        cl.label_balanced_mean,
        cl.relevance,
        cl.faithfulness,
        cl.transfer,
    ],
)
def test_what_can_be_set_in_python_can_be_set_on_the_command_line(verb):
    known = {field.name for field in fields(RunSettings)} | set(FIELDS)
    missing = set(inspect.signature(verb).parameters) - known - OF_A_RUN
    assert not missing


def test_every_field_has_an_option_that_reaches_it():
    names = {p.name for p in flags().values()}
    for field in fields(RunSettings):
        assert field.name in names or field.name in ("training", "finetuning")
    for name in FIELDS:
        assert name == "seed" or {f"finetune_{name}"} <= names
        assert name in names or name == "learning_rate"
    values = dict.fromkeys(names)
    given = {"model": "toy", "task": "toy", "warmup": 0.25, "finetune_max_grad_norm": 0.5}
    settings = settings_of(
        {k: v for k, v in {**values, **given, "size": "3", "retain": ["far"]}.items() if v}
    )
    assert settings.training == TRANSFER.updated({"warmup": 0.25})
    assert settings.finetuning.max_grad_norm == 0.5
    assert settings.finetuning.learning_rate == 3e-3  # the toy model's own
    assert (settings.size, settings.retain) == (3, ("far",))


def test_the_competence_stage_follows_the_transfer_where_nothing_is_said():
    both = settings_of({"model": "m", "task": "toy", "bf16": True, "accumulation": 4, "seed": 5})
    assert (both.finetuning.bf16, both.finetuning.accumulation) == (True, 4)
    assert both.finetuning == COMPETENCE.updated({"bf16": True, "accumulation": 4, "seed": 5})
    other = settings_of({"model": "m", "task": "toy", "bf16": True, "finetune_bf16": False})
    assert (other.training.bf16, other.finetuning.bf16) == (True, False)


def test_settings_come_back_from_json_those_of_older_runs_too():
    from dataclasses import asdict

    settings = settings_of(
        {"model": "toy", "task": "toy", "replay": [0.5, 1.0], "finetune_epochs": 2}
    )
    assert RunSettings.from_dict(asdict(settings)) == settings
    old = {
        "model": "toy", "task": "toy", "targets": ["near"], "finetune_rate": 0.5,
        "finetune_epochs": None, "epochs": 3, "accumulation": 2, "bf16": False, "seed": 1,
    }  # fmt: skip
    found = RunSettings.from_dict(old)
    assert found.training == TRANSFER.updated({"epochs": 3, "accumulation": 2, "seed": 1})
    assert (found.finetuning.learning_rate, found.finetuning.epochs) == (0.5, 15)
    assert (found.finetuning.accumulation, found.finetuning.seed) == (2, 1)


def test_what_is_no_field_is_refused():
    with pytest.raises(TypeError, match="no argument 'epoch'; training options are learning_rate"):
        TRANSFER.updated({"epoch": 3})
    with pytest.raises(cl.InputError, match="bf16 must be True or False"):
        unchecked(TrainingOptions, 1e-3, bf16="yes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "circus"], "'circus' is not one of 'circuit'"),
        (["--method", "magic"], "'magic' is not one of 'cdt'"),
        (["--positions", "some"], "'some' is not one of 'all'"),
        (["--dtype", "int8"], "'int8' is not one of 'auto'"),
        (["--epochs", "0"], "epochs must be a whole number"),
        (["--epochs", "many"], "Invalid value for '--epochs'"),
        (["--size", "big"], "--size takes a number of heads"),
        (["--curve-size", "big"], "--curve-size takes a number of heads"),
        (["--label", "good"], "--label takes name=value"),
        (["--column", "text=words"], "There is no column 'text'"),
        (["--task", "nusa"], "There is no task 'nusa'; use afrisenti, americasnli"),
        (["--data", "nowhere"], "There is no data folder nowhere"),
        (["--replay", "-1"], "replay is a number of source examples"),
        (["--n-random", "0"], "n_random must be positive"),
        (["--bogus"], "No such option: --bogus"),
    ],
)
def test_mistakes_are_found_before_torch_is_imported(arguments, message, tmp_path):
    code = (
        "import sys; from circuitlens.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    command = ["run", "--model", "toy", "--task", "toy", "--out", str(tmp_path / "out")]
    found = subprocess.run(
        [sys.executable, "-c", code, *command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "400", "PATH": ""},
    )
    assert found.returncode == 2
    assert message in " ".join(found.stderr.split())
    assert found.stdout.strip() == "False"
    assert not (tmp_path / "out").exists()


def test_version_and_short_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.strip() == f"circuitlens {cl.__version__}"
    for command in ((), ("run",), ("discover",), ("compare",)):
        assert "Usage" in runner.invoke(app, [*command, "-h"]).output


def test_help_lists_what_the_registries_hold():
    options = flags()
    assert all(name in options["--strategy"].help for name in NAMES)
    assert all(name in options["--method"].help for name in cl.METHODS)
    assert all(name in options["--task"].help for name in data_sets())
    for field, flag in (("kv_policy", "--kv-policy"), ("pooling", "--pooling")):
        assert all(name in options[flag].help for name in CHOICES[field])


def test_a_file_of_a_configuration_is_a_strategy(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}', encoding="utf-8")
    given = {"model": "toy", "task": "toy", "strategies": ("circuit", f"peft:{path}")}
    settings = settings_of(given)
    settings.check_names()
    first = folder_of(settings.strategies[1])
    assert first.startswith("peft-mine-")
    path.write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}', encoding="utf-8")
    assert folder_of(settings.strategies[1]) != first
    assert folder_of("circuit") == "circuit"
    path.unlink()
    with pytest.raises(cl.InputError, match=r"no configuration file .*mine\.json"):
        settings.check_names()
    with pytest.raises(cl.InputError, match="no PEFT configuration file"):
        folder_of(settings.strategies[1])


def test_several_amounts_of_replay_and_the_one_of_older_runs():
    given = {"model": "toy", "task": "toy", "replay": (0.0, 0.5, 0.5)}
    assert settings_of(given).replay == (0.0, 0.5)
    old = RunSettings.from_dict({"model": "toy", "task": "toy", "replay": [0.25]})
    assert old.replay == (0.25,)
