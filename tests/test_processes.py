"""A transfer that is killed and repeated, and work that several processes share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import circuitlens as cl
from circuitlens.adapt.trainer import KeepBest
from circuitlens.tasks import toy

pytestmark = pytest.mark.slow

OPTIONS = {"learning_rates": [1e-3, 3e-3], "epochs": 3, "seed": 1}

COMMON = f"""
import os, signal, sys
import torch
torch.set_num_threads(1)
import circuitlens as cl
from circuitlens.tasks import toy
out = sys.argv[1]
model = toy.toy_model(n_layers=1)
circuit = cl.Circuit.of(["a0.h1"], 1, model.geometry.n_heads)
target = cl.load_task("toy").to("near")
options = {OPTIONS!r}
"""

KILLED = (
    COMMON
    + """
from circuitlens.adapt.trainer import KeepBest
on_save = KeepBest.on_save
def save(self, args, state, *rest, **more):
    on_save(self, args, state, *rest, **more)
    if "rate-0.003" in args.output_dir and state.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
KeepBest.on_save = save
cl.transfer(model, circuit, target, checkpoints=out, quiet=True, **options)
"""
)

GRID_OUT = (
    COMMON
    + """
rate = {"learning_rates": [1e-3], "epochs": 1}
for _ in range(2):  # the second call finds all cells
    table = cl.compare(
        model, circuit, target.origin, ["near"], strategies=["circuit", "norms"], seeds=[0],
        out=f"{out}/grid", quiet=True, **rate,
    )
    assert not table.errors, table.errors
    cells = [{**cell, "seconds": 0} for cell in table.cells]
import json
with open(f"{out}/rank-{os.environ['RANK']}.json", "w") as file:
    json.dump([[cell["strategy"], cell["target_after"]["accuracy"]] for cell in cells], file)
"""
)

SHARED_OUT = (
    COMMON
    + """
from accelerate import PartialState
for strategy in ("circuit", "head"):
    result = cl.transfer(model, circuit, target, strategy=strategy, quiet=True, **options)
    assert PartialState().num_processes == 2 and torch.distributed.get_backend() == "gloo"
    result.save(f"{out}/{strategy}-{os.environ['RANK']}")
"""
)

DISCOVERY = """
task = cl.load_task("toy")
model = cl.load(where)
examples = task["pool_a"][:150]  # batches of 32 that two processes cannot share evenly

def found(**options):
    baseline = cl.label_balanced_mean(
        model, task, examples=examples, allow_chance=True, quiet=True, **options
    )
    scores = {
        (method, by_position): cl.relevance(
            model, task, baseline, method=method, mlps=True, by_position=by_position,
            max_examples=50, quiet=True,
        )
        for method, by_position in (("cdt-linear", True), ("ablation", False), ("dla", False))
    }
    curve = cl.faithfulness(
        model, task, scores["cdt-linear", True], baseline, n_random=5,
        examples=task["validation"][:70], quiet=True,
    )
    compared = cl.compare_scorers(
        model, task, baseline, methods=["cdt-linear", "random"], n_random=2, max_examples=40,
        examples=task["validation"][:40], quiet=True,
    )
    table = compared.table.drop(columns=["seconds", "peak_mib"])
    return {
        "ids": baseline.example_ids,
        "n": baseline.n_per_label,
        "baseline": [baseline.mean, baseline.mlp_mean],
        "scores": [t for s in scores.values() for t in (s.per_example, s.mlps, s.by_position)],
        "curve": [torch.tensor(curve.to_frame().select_dtypes("number").to_numpy())],
        "scorers": [torch.tensor(table.select_dtypes("number").to_numpy())],
        "caveat": curve.caveat,
    }
"""

DISCOVERED = (
    COMMON
    + """
where = f"{out}/model"
"""
    + DISCOVERY
    + """
seen, real = [], model.label_logits
model.label_logits = lambda batch, hooks=None: seen.append(len(batch)) or real(batch, hooks)
result = found()
from accelerate import PartialState
assert PartialState().num_processes == 2
result["rows"] = sum(seen)
torch.save(result, f"{out}/rank-{os.environ['RANK']}.pt")
"""
)


@pytest.fixture(scope="module")
def begin():
    model = toy.toy_model(n_layers=1)
    circuit = cl.Circuit.of(["a0.h1"], 1, model.geometry.n_heads)
    return model, circuit, cl.load_task("toy").to("near")


def numbers(result):
    content = result.to_dict()
    assert content.pop("seconds") > 0
    return content


def test_a_killed_transfer_goes_on_to_the_same_numbers(begin, tmp_path):
    whole = cl.transfer(*begin, **OPTIONS)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "rate-0.001" / "stage-0" / "finished.safetensors").is_file()
    killed = tmp_path / "rate-0.003" / "stage-0"
    assert not (killed / "finished.safetensors").is_file()
    # Two epochs of 170 examples in batches of 16.
    assert (killed / "checkpoint-22" / "best.safetensors").is_file()
    again = cl.transfer(*begin, checkpoints=tmp_path, **OPTIONS)
    assert numbers(again) == numbers(whole)
    assert again.model.fingerprint() == whole.model.fingerprint()


def test_a_clock_that_is_set_back_costs_no_checkpoint(begin, tmp_path, monkeypatch):
    """Every checkpoint looks older than those before it."""
    dates = iter(range(2_000_000_000, 0, -100_000))
    kept = []
    on_save = KeepBest.on_save

    def saved(self, args, state, control, **options):
        on_save(self, args, state, control, **options)
        folders = list(Path(args.output_dir).glob("checkpoint-*"))
        kept.append([int(f.name.split("-")[1]) for f in folders])
        for folder in folders:
            os.utime(folder, (date := next(dates), date))

    monkeypatch.setattr(KeepBest, "on_save", saved)
    result = cl.transfer(*begin, checkpoints=tmp_path, **{**OPTIONS, "epochs": 4})
    assert result.n_trainable
    assert kept == [[11], [22], [33], [44]] * (len(kept) // 4)
    assert kept


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def launched(source: str, tmp_path) -> str:
    """Run a script in two processes under Accelerate; return what they said."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    return launch(str(script), str(tmp_path))


def launch(*arguments: str) -> str:
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *options.split()),
            *("--dynamo_backend", "no", "--main_process_port", str(free_port())),
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_share_discovery(toy_proxy, tmp_path):
    toy_proxy.save(tmp_path / "model")
    launched(DISCOVERED, tmp_path)
    alone: dict = {"torch": torch, "cl": cl, "where": tmp_path / "model"}
    exec(DISCOVERY, alone)
    expected = alone["found"]()
    for rank in (0, 1):
        result = torch.load(tmp_path / f"rank-{rank}.pt")
        for name in ("ids", "n", "caveat"):
            assert result[name] == expected[name]
        for name in ("baseline", "scores", "curve", "scorers"):
            for one, other in zip(result[name], expected[name], strict=True):
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
    # Each did about half of it.
    rows = [torch.load(tmp_path / f"rank-{rank}.pt")["rows"] for rank in (0, 1)]
    assert 0.3 < rows[0] / sum(rows) < 0.7


def test_two_processes_share_a_run(tmp_path):
    options = (
        "run --model {model} --task toy --target near --strategy circuit --strategy norms --size 3 "
        "--n-random 2 --epochs 1 --finetune-epochs 2 --rate 1e-3 --seed 1 --out {out}"
    )
    toy.toy_model(n_layers=1).save(tmp_path / "model")
    alone, shared = (
        options.format(model=tmp_path / "model", out=tmp_path / out).split()
        for out in ("alone", "shared")
    )
    command = [sys.executable, "-m", "circuitlens", *alone]
    subprocess.run(command, check=True, capture_output=True)
    said = launch("--module", "circuitlens", *shared)
    assert said.count("Report: ") == 1
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("alone", "shared")]
    assert records[1]["finished"]
    assert records[0]["circuit"]["heads"] == records[1]["circuit"]["heads"]
    for one, other in zip(records[0]["transfers"], records[1]["transfers"], strict=True):
        assert one["strategy"] == other["strategy"]
        assert one["target_after"]["accuracy"] == pytest.approx(
            other["target_after"]["accuracy"], abs=0.01
        )
    assert not list((tmp_path / "shared").rglob("*.tmp*"))


def test_two_processes_make_one_comparison(begin, tmp_path):
    launched(GRID_OUT, tmp_path)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    names = ["circuit", "norms", "majority", "n-grams"]
    assert [strategy for strategy, _ in found[0]] == names
    saved = cl.Comparison.load(tmp_path / "grid")
    assert not saved.errors
    assert [c["target_after"]["accuracy"] for c in saved.cells] == [a for _, a in found[0]]


def test_two_processes_train_as_one_does(begin, tmp_path):
    launched(SHARED_OUT, tmp_path)
    for strategy in ("circuit", "head"):
        alone = cl.transfer(*begin, strategy=strategy, **OPTIONS)
        alone.save(tmp_path / f"{strategy}-alone")
        name = "adapter_model" if alone.is_adapter else "weights"
        weights = [
            load_file(tmp_path / f"{strategy}-{who}" / f"{name}.safetensors")
            for who in ("0", "1", "alone")
        ]
        results = [
            json.loads((tmp_path / f"{strategy}-{who}" / "result.json").read_text())
            for who in ("0", "alone")
        ]
        for key, tensor in weights[2].items():
            # Both processes end with the same bits, and with one process's up to rounding.
            assert torch.equal(weights[0][key], weights[1][key])
            torch.testing.assert_close(weights[0][key], tensor, rtol=0, atol=1e-5)
        accuracies = [[entry["accuracy"] for entry in r["history"]] for r in results]
        assert accuracies[0] == accuracies[1]
        assert results[0]["learning_rate"] == results[1]["learning_rate"]
