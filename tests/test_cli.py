from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny

import circuitlens as cl
from circuitlens import run_exchange, run_folder
from circuitlens.adapt.options import COMPETENCE, TRANSFER
from circuitlens.run_folder import RunFolder
from circuitlens.run_settings import RunSettings
from circuitlens.tasks import toy

FAST = ["--max-examples", "40", "--n-random", "2", "--rate", "1e-3", "--epochs", "1"]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process; returns its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from circuitlens.cli import main

        monkeypatch.setattr(sys, "argv", ["circuitlens", *map(str, arguments)])
        capsys.readouterr()  # what the test itself printed, such as a bar while it saved a model
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def proxy_folder(tmp_path_factory, toy_proxy) -> Path:
    folder = tmp_path_factory.mktemp("proxy")
    toy_proxy.save(folder)
    return folder


def base(proxy_folder, out, *more):
    where = ["--model", proxy_folder, "--task", "toy", "--source", "source", "--out", out]
    return ["run", *where, "--target", "near", "-q", *FAST, *more]


def little(proxy_folder, **settings) -> RunSettings:
    """Settings of a run that takes seconds."""
    return RunSettings(
        model=str(proxy_folder),
        task="toy",
        source="source",
        targets=("near",),
        learning_rates=(1e-3,),
        training=TRANSFER.updated({"epochs": 1}),
        **settings,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, proxy_folder) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "done"
    settings = little(proxy_folder, max_examples=40, n_random=2, strategies=("circuit", "norms"))
    RunFolder.create(out, settings, quiet=True).run_all()
    return out


def test_a_run_writes_everything(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"run.json", "scores.safetensors", "circuit.json", "report.html", "transfers"} <= names
    record = json.loads((finished / "run.json").read_text())
    assert record["finished"]
    assert record["settings"]["targets"] == ["near"]
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["model_fingerprint"]) == len(record["data_fingerprint"]) == 16
    assert len(record["scores"]) == 16
    assert [t["strategy"] for t in record["transfers"]] == ["circuit", "norms"]
    assert record["faithfulness"][-1]["faithfulness"] == 1.0
    assert not [n for n in names if n.startswith(".")]


@pytest.mark.slow
def test_a_run_goes_through_where_the_heads_hurt(proxy_folder, tmp_path, monkeypatch):
    original = run_folder.faithfulness

    def hurt(*arguments, **options):
        curve = original(*arguments, **options)
        parts = {k: -getattr(curve, k) for k in ("margin", "example_margin")}
        return replace(curve, **parts)

    monkeypatch.setattr(run_folder, "faithfulness", hurt)
    settings = little(proxy_folder, max_examples=20, n_random=1, strategies=("norms",))
    run = RunFolder.create(tmp_path / "run", settings, quiet=True)
    assert len(run.run_all()) == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"]
    assert "heads hurt" in record["faithfulness_caveat"]
    assert {row["faithfulness"] for row in record["faithfulness"]} == {None}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The heads hurt on these examples" in page
    assert ">nan<" not in page.lower()


def test_a_finished_run_is_never_overwritten(cli, finished, proxy_folder):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    code, _, err = cli(*base(proxy_folder, finished))
    assert code == 2
    assert "contains a finished run" in err
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_single_stages_on_a_finished_run(cli, finished, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    code, out, _ = cli("faithfulness", folder, "-q")
    assert code == 0
    assert "random_faithfulness" in out
    code, _, err = cli("discover", folder, "--method", "ablation", "-q")
    assert code == 2
    assert "--redo" in err
    code, out, _ = cli("transfer", folder, "--target", "far", "--strategy", "norms", "-q")
    assert code == 0
    assert "far" in out
    assert (folder / "transfers" / "far" / "norms" / "result.json").is_file()
    (folder / "figures").mkdir()
    (folder / "figures" / "old.csv").touch()
    code, out, _ = cli("discover", folder, "--redo", "--method", "cdt-linear", "--size", "2", "-q")
    assert code == 0
    assert len(cl.Circuit.load(folder / "circuit.json")) == 2
    assert not (folder / "transfers").exists()
    assert not (folder / "figures").exists()
    # What came of the old circuit is kept, and can be read.
    old = folder / "replaced-1"
    assert str(old) in out
    assert json.loads((old / "run.json").read_text())["settings"]["size"] == 0.25
    assert len(cl.Circuit.load(old / "circuit.json")) == 4
    assert cl.TransferResult.load(old / "transfers" / "far" / "norms").strategy == "norms"
    assert (old / "figures" / "old.csv").is_file()
    assert "cdt-linear" in (folder / "report.html").read_text()
    assert not json.loads((folder / "run.json").read_text())["finished"]
    # What was redone is what later stages see.
    assert RunFolder.open(folder).settings.method == "cdt-linear"
    code, out, _ = cli("report", folder, "-q")
    assert code == 0
    assert "report.html" in out
    assert "cdt-linear" in (folder / "report.html").read_text()


def test_a_redo_without_backup_keeps_nothing_of_the_old_circuit(cli, finished, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    code, _, _ = cli("discover", folder, "--redo", "--no-backup", "--size", "2", "-q")
    assert code == 0
    assert not list(folder.glob("replaced-*"))
    assert not (folder / "transfers").exists()
    assert not (folder / "faithfulness.safetensors").exists()


@pytest.mark.parametrize("step", range(1, 14, 2))
@pytest.mark.parametrize("backup", [True, False])
def test_an_exchange_that_breaks_off_is_not_begun_or_completed(
    finished, tmp_path, monkeypatch, step, backup
):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    old = cl.Circuit.load(folder / "circuit.json")
    scores = cl.HeadScores.load(folder / "scores.safetensors")
    record = json.loads((folder / "run.json").read_text())
    record["settings"]["size"] = 2
    n_steps = 0

    def breaking(function):
        def broken(*args, **options):
            nonlocal n_steps
            n_steps += 1
            if n_steps == step:
                raise KeyboardInterrupt
            return function(*args, **options)

        return broken

    with monkeypatch.context() as patch:
        for place, name in (
            (os, "replace"),
            (Path, "rename"),
            (Path, "unlink"),
            (shutil, "rmtree"),
        ):
            patch.setattr(place, name, breaking(getattr(place, name)))
        try:
            run_exchange.exchange(folder, record, scores, scores.top(2), backup=backup)
        except KeyboardInterrupt:
            assert n_steps >= step
    run = RunFolder.open(folder, quiet=True)
    sizes = len(cl.Circuit.load(folder / "circuit.json")), run.settings.size
    transfers = len(list(folder.glob("transfers/*/*/result.json")))
    kept = len(list(folder.glob("replaced-1/transfers/*/*/result.json")))
    if sizes == (2, 2):
        assert (transfers, kept) == (0, 2 if backup else 0)
        assert not (folder / "report.html").exists()
        assert (folder / "replaced-1" / "run.json").is_file() == backup
    else:
        assert sizes == (len(old), 0.25)
        assert (transfers, kept) == (2, 0)
    assert not (folder / ".redo").exists()


def test_a_run_opens_from_any_folder_and_moves_with_its_data(cli, tmp_path, monkeypatch, toy_proxy):
    import shutil

    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    toy_proxy.save(project / "model")
    for language in ("source", "near"):
        rows = [
            f"{e.id},{e.fields['text']},{e.label}"
            for e in cl.load_task("toy", language)["pool_a"][:200]
        ]
        (project / f"{language}.csv").write_text("\n".join(["id,text,label", *rows]))
    monkeypatch.chdir(project)
    words = ["--model", "model", "--task", "{language}.csv", "--source", "source", "--size", "2"]
    template = ["--template", "{text} ->", "--out", "runs/one", "--strategy", "norms"]
    code, _, err = cli("run", *words, *template, *FAST, "-q")
    assert code == 0, err
    record = (project / "runs" / "one" / "run.json").read_text()
    assert str(tmp_path) not in record
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("faithfulness", project / "runs" / "one", "--redo", "-q")
    assert code == 0, err
    shutil.move(project, tmp_path / "moved")
    run = Path("moved", "runs", "one")
    code, _, err = cli("transfer", run, "--target", "near", "-q")
    assert code == 0, err
    assert (run / "transfers" / "near" / "norms" / "result.json").is_file()
    record = json.loads((run / "run.json").read_text())
    assert (record["settings"]["model"], record["settings"]["task"]) == ("model", "{language}.csv")


def test_a_report_is_never_older_than_its_numbers(cli, finished, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "report_of", broken)
        code, _, _ = cli("transfer", folder, "--target", "far", "--strategy", "norms", "-q")
    assert code != 0
    assert (folder / "transfers" / "far" / "norms" / "result.json").is_file()
    assert not (folder / "report.html").exists()
    code, _, _ = cli("faithfulness", folder, "-q")
    assert code == 0
    assert "far" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--size", "abc"), "--size takes a number of heads"),
        (("--size", "2.5"), "share of heads must be between 0 and 1"),
        (("--size", "99"), "99 heads were asked for"),
        (("--method", "magic"), "magic"),
        (("--method", "hsu2024"), "GPT2"),
    ],
)
def test_a_mistake_costs_no_finished_work(cli, finished, tmp_path, option, message):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    code, _, err = cli("discover", folder, "--redo", "-q", *option)
    assert (code, message in err) == (2, True), err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_run_is_finished_when_all_it_was_asked_for_is_there(cli, finished, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)

    def is_finished():
        return json.loads((folder / "run.json").read_text())["finished"]

    (folder / "faithfulness.safetensors").unlink()
    shutil.rmtree(folder / "transfers" / "near" / "norms")
    cli("transfer", folder, "--target", "near", "--strategy", "norms", "-q")
    assert not is_finished()
    assert cli("faithfulness", folder, "-q")[0] == 0
    assert is_finished()


@pytest.mark.slow
def test_an_unfinished_run_goes_on_and_other_settings_are_refused(
    cli, proxy_folder, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "transfer", interrupt)
        code, _, err = cli(*base(proxy_folder, out, "--strategy", "norms"))
    assert code == 130
    assert "resumes there" in err
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]
    assert not (out / "report.html").exists()
    code, _, err = cli(*base(proxy_folder, out, "--strategy", "norms", "--seed", "3"))
    assert code == 2
    assert "seed was 0, now 3" in err
    stamp = (out / "scores.safetensors").stat().st_mtime_ns
    code, printed, _ = cli(*base(proxy_folder, out, "--strategy", "norms"))
    assert code == 0
    assert "norms" in printed
    assert (out / "scores.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_only(proxy_folder, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "circuitlens.cli", *map(str, base(proxy_folder, out))]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        # Tests that a shell runs in the background ignore interrupts, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "scores.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    cl.HeadScores.load(out / "scores.safetensors")
    json.loads((out / "run.json").read_text())
    for path in out.rglob("result.json"):
        json.loads(path.read_text())


def write_csv(path, rows):
    path.write_text("text,label\n" + "".join(f"{t},{la}\n" for t, la in rows))
    return path


def test_bad_input_is_one_clear_sentence(cli, proxy_folder, tmp_path, shared):
    nusax = ["--task", "nusax", "--data", shared / "data" / "nusax"]
    tiny("qwen2", torch.float32).save_pretrained(tmp_path / "no_tokenizer")
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=600))
    mamba.save_pretrained(tmp_path / "mamba")
    toy.toy_tokenizer().save_pretrained(tmp_path / "mamba")
    no_column = tmp_path / "columns.csv"
    no_column.write_text("sentence,label\na,b\n")
    rows = [
        (f"po {a}{b} ja {c}a", "xy"[n % 2])
        for a in "bdfgh"
        for b in "aeiou"
        for n, c in enumerate("bdfghjkl")
    ]
    empty = write_csv(tmp_path / "empty.csv", [*rows, ("", "x")])
    lonely = write_csv(tmp_path / "lonely.csv", [*rows, ("po", "z")])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    model = ["--model", proxy_folder]
    out = ["--out", tmp_path / "out"]
    two = ["--label", "x= positive", "--label", "y= negative"]
    cases = {
        r"NusaX has no language 'klingon'; it has acehnese, .*toba_batak": [
            *model,
            *nusax,
            "--source",
            "klingon",
            *out,
        ],
        r"toy task has no language 'mars'": [*model, "--task", "toy", "--target", "mars", *out],
        r"There is no data file .*missing\.csv": [*model, "--task", tmp_path / "missing.csv", *out],
        r"columns\.csv has no column 'text'; its columns are \['sentence', 'label'\]": [
            *model,
            "--task",
            no_column,
            *out,
        ],
        r"needs one word for every label": [
            *model,
            "--task",
            "toy",
            "--readout",
            "token",
            "--label",
            "positive= bagus",
            "--label",
            "positive= baik",
            "--label",
            "negative= negative",
            "--label",
            "neutral= neutral",
            *out,
        ],
        r"No example has the label 'z' in": [
            *model,
            "--task",
            lonely,
            *two,
            "--label",
            "z= neutral",
            *out,
        ],
        r"has an empty text: remove the row": [*model, "--task", empty, *two, *out],
        r"No tokenizer was found in .*no_tokenizer": [
            "--model",
            tmp_path / "no_tokenizer",
            "--task",
            "toy",
            *out,
        ],
        r"no attention heads that TransformerLens can hook": [
            "--model",
            tmp_path / "mamba",
            "--task",
            "toy",
            *out,
        ],
        r"exists, is not empty and contains no circuitlens run": [
            *model,
            "--task",
            "toy",
            "--out",
            tmp_path / "used",
        ],
        r"There is no task 'poetry'; use afrisenti, americasnli": [
            *model,
            "--task",
            "poetry",
            *out,
        ],
        r"--size takes a number of heads": [*model, "--task", "toy", "--size", "few", *out],
        r"share of heads must be between 0 and 1": [*model, "--task", "toy", "--size", "2.5", *out],
        r"99 heads were asked for": [*model, "--task", "toy", "--size", "99", *out],
        r"circuit would have no heads": [*model, "--task", "toy", "--size", "0", *out],
        r"There is no column 'foo'": [*model, "--task", "toy", "--column", "foo=x", *out],
        r"'gpu'.*cpu": ["--model", "toy", "--task", "toy", "--device", "gpu", *out],
        r"toy model is made in float32": [
            *("--model", "toy", "--task", "toy", "--dtype", "float64"),
            *out,
        ],
        r"--label takes name=value": [*model, "--task", "toy", "--label", "positive", *out],
    }
    for pattern, arguments in cases.items():
        code, printed, err = cli("run", *arguments, "-q")
        assert code == 2, (pattern, err)
        assert re.search(pattern, err), (pattern, err)
        assert err.startswith("Error: ")
        assert len(err.strip().splitlines()) == 1, err
        assert "Traceback" not in err + printed
        assert not (tmp_path / "out").exists(), pattern


def test_a_folder_without_run_is_named(cli, tmp_path):
    code, _, err = cli("report", tmp_path)
    assert code == 2
    assert "contains no circuitlens run" in err


def test_help_answers_without_the_heavy_imports():
    script = (
        "import sys; sys.argv = ['circuitlens', 'run', '--help']\n"
        "from circuitlens.cli import main\n"
        "try: main()\n"
        "finally: print('HEAVY' if 'torch' in sys.modules else 'LIGHT')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LIGHT" in done.stdout
    for word in ("--target", "--competence", "--positions", "An interrupted run resumes"):
        assert word in " ".join(done.stdout.split()), word


def test_a_competence_stage_saves_the_proxy(tmp_path, toy_proxy, monkeypatch):
    settings = RunSettings(
        model="toy",
        task="toy",
        competence="always",
        finetuning=COMPETENCE.updated({"epochs": 1, "learning_rate": 1e-5}),
    )
    # Training itself is tested elsewhere; one epoch at a tiny rate keeps what it was given.
    monkeypatch.setattr(toy, "toy_model", lambda seed: toy_proxy.clone())
    trained = RunFolder.create(tmp_path / "run", settings, quiet=True).model
    assert (tmp_path / "run" / "proxy" / "config.json").is_file()
    assert trained.fingerprint() != toy_proxy.fingerprint()
    assert RunFolder.open(tmp_path / "run").model.fingerprint() == trained.fingerprint()


def test_wrong_options_are_explained_without_traceback(cli):
    code, out, err = cli("run", "--nonsense")
    assert code == 2
    assert "No such option: --nonsense" in out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_the_whole_line_on_files_of_ones_own(cli, proxy_folder, tmp_path, toy_task):
    for language in ("source", "near"):
        task = toy_task if language == "source" else toy_task.to(language)
        lines = ["key,sentence,feeling"]
        for pool, size in (("pool_a", 150), ("pool_b", 100), ("test", 100)):
            lines += [f"{e.id},{e.text},{e.label}" for e in task[pool][:size]]
        (tmp_path / f"{language}.csv").write_text("\n".join(lines) + "\n")
    words = [f"--label={name}= {name}" for name in toy_task.labels]
    code, out, err = cli(
        "run", "--model", proxy_folder, "--task", tmp_path / "{language}.csv",
        "--source", "source", "--target", "near", "--template", "{sentence} ->", *words,
        "--column", "label=feeling", "--column", "id=key", "--strategy", "norms",
        "--out", tmp_path / "out", "-q", *FAST,
    )  # fmt: skip
    assert code == 0, err
    assert "norms" in out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["labels"]["positive"] == " positive"
    assert record["baseline"]["accuracy"] > 0.8


def test_a_folder_that_another_process_works_on_is_refused(cli, tmp_path):
    from circuitlens.utils.claims import claimed

    out = tmp_path / "run"
    with claimed(out):
        code, _, err = cli("run", "--model", "toy", "--task", "toy", "--out", out)
        assert code == 2
        assert "Another process is using" in err
        with claimed(tmp_path / "other"):
            pass
    assert not out.exists()
    with claimed(out):
        pass
