"""Settings files and recipes: what they stand for, what they repeat, what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import circuitlens as cl
from circuitlens import cli
from circuitlens.adapt.options import TRANSFER
from circuitlens.cli_options import run_options
from circuitlens.run_settings import RunSettings
from circuitlens.settings_files import RECIPES, expanded, flags_of, settings_file


def settings_of(monkeypatch, arguments) -> RunSettings:
    """What the command line makes of arguments, without running anything."""
    from circuitlens.run_folder import RunFolder

    seen = []

    def create(path, found, **_):
        seen.append(found)
        raise cl.InputError("far enough")

    monkeypatch.setattr(RunFolder, "create", create)
    monkeypatch.setattr(RunSettings, "check_names", lambda _: None)
    found = CliRunner().invoke(cli.app, expanded(arguments))
    assert isinstance(found.exception, cl.InputError), found.output
    return seen[0]


BASE = {"model": "m", "task": "toy"}
MANY = RunSettings(
    "m",
    "data/{language}.csv",
    source="a",
    targets=("b", "c"),
    template="{text} ->",
    labels={"x": " ex", "y": (" why", " yes")},
    columns={"label": "l", "id": "n"},
    share_a=0.4,
    mlps=True,
    bos=False,
    chat=True,
    system="- be brief: please",
    size=8,
    sizes=(4, 0.5),
    strategies=("circuit", "lora"),
    learning_rates=(1e-5, 3e-4),
    training=TRANSFER.updated({"epochs": 3, "bf16": True, "warmup": 0.2}),
    seed=7,
)


@pytest.mark.parametrize("chosen", [RunSettings(**BASE), MANY], ids=["usual", "many"])
def test_the_file_of_a_run_repeats_it(tmp_path, monkeypatch, chosen):
    path = tmp_path / "run.yaml"
    path.write_text(settings_file(chosen), encoding="utf-8")
    again = settings_of(monkeypatch, ["run", "--config", str(path), "--out", str(tmp_path / "o")])
    assert again == chosen
    assert set(yaml.safe_load(path.read_text())) >= set(BASE)


@settings(deadline=None, max_examples=40)
@given(
    epochs=st.integers(1, 99),
    rates=st.lists(st.floats(1e-7, 1, allow_nan=False), min_size=1, max_size=3, unique=True),
    share=st.one_of(st.integers(1, 40), st.floats(0.01, 0.99)),
    word=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1),
)
def test_any_values_come_back(epochs, rates, share, word):
    chosen = RunSettings(
        "m",
        "t.csv",
        labels={"a": f" {word}", "b": " b"},
        size=share,
        learning_rates=tuple(rates),
        training=TRANSFER.updated({"epochs": epochs}),
    )
    flags = flags_of(yaml.safe_load(settings_file(chosen)), "here")
    assert f"--label=a= {word}" in flags
    assert [float(f.partition("=")[2]) for f in flags if f.startswith("--rate=")] == rates


def test_the_command_line_takes_the_place_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "s.yaml"
    path.write_text("model: m\ntask: toy\ntarget: [a, b]\nepochs: 9\nmlps: true\nbos: true\n")
    more = ["--target", "c", "--epochs=4", "--no-bos", "--out", str(tmp_path / "o")]
    found = settings_of(monkeypatch, ["run", *more, "--config", str(path)])
    assert (found.targets, found.training.epochs, found.mlps, found.bos) == (("c",), 4, True, False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoch: 3", r"the key 'epoch', which is not an option.*did you mean 'epochs'\?"),
        ("finetune_epoch: 3", r"did you mean 'finetune-epochs'\?"),
        ("zzzz: 3", "see circuitlens run --help"),
        ("- a\n- b", "must map options to values"),
        ("a: [b", "is not valid YAML"),
        ("size: {a: !!python/object:os.system x}", "is not valid YAML"),
        ("epochs: [[1]]", r"'epochs' of .* has the value \[1\]"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, content, words):
    path = tmp_path / "s.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(cl.InputError, match=words):
        expanded(["run", "--config", str(path)])


def test_files_and_recipes_that_there_are_not(tmp_path):
    with pytest.raises(cl.InputError, match="no settings file"):
        expanded(["run", f"--config={tmp_path / 'none.yaml'}"])
    with pytest.raises(cl.InputError, match="no recipe 'mine': choose one of ct-sft"):
        expanded(["run", "--recipe", "mine"])
    with pytest.raises(cl.InputError, match="--config needs a value"):
        expanded(["run", "--config"])
    assert expanded(["report", "--config", "x"]) == ["report", "--config", "x"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_settings_of_a_run(recipe, monkeypatch, tmp_path):
    found = settings_of(monkeypatch, ["run", "--recipe", recipe, "--out", str(tmp_path / "o")])
    assert found.task
    local = ["--model", "here", "--max-examples", "9", "--out", str(tmp_path / "p")]
    swapped = settings_of(monkeypatch, ["run", "--recipe", recipe, *local])
    assert (swapped.model, swapped.max_examples) == ("here", 9)


def test_a_file_may_say_where_transfers_run(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ntask: toy\nexecutor: ray\naddress: auto\ngpus: 0.5\ncpus: 2\n")
    words = expanded(["run", "--config", str(file), "--out", "x"])
    assert {"--executor=ray", "--address=auto", "--gpus=0.5", "--cpus=2"} <= set(words)
    # It says nothing of the results, so a run does not keep it.
    assert "executor" not in settings_file(MANY)


def test_every_option_has_a_key():
    assert len(run_options()) > 50
    for option in run_options():
        flag = option.annotation.__metadata__[0].default.partition("/")[0]
        assert flags_of({flag.removeprefix("--"): None}, "here") == []


@pytest.mark.slow
def test_a_run_holds_the_file_that_repeats_it(tmp_path, monkeypatch, toy_proxy):
    toy_proxy.save(tmp_path / "proxy")
    options = ["--model", str(tmp_path / "proxy"), "--task", "toy", "--max-examples", "20"]
    options += ["--n-random", "1", "--size", "3", "-q"]
    monkeypatch.setattr(sys, "argv", ["circuitlens", "run", *options, "--out", str(tmp_path / "a")])
    run_main()
    file = tmp_path / "a" / "run.yaml"
    again = ["run", "--config", str(file), "--out", str(tmp_path / "b"), "-q"]
    monkeypatch.setattr(sys, "argv", ["circuitlens", *again])
    run_main()
    first, second = (cl.Circuit.load(Path(tmp_path, n, "circuit.json")) for n in "ab")
    assert first.heads == second.heads


def run_main() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
