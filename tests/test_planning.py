"""Plans: what they count is what a run does."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import psutil
import pytest
import torch

import circuitlens as cl
from circuitlens import planning
from circuitlens.adapt.options import COMPETENCE, TRANSFER
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.scorers import SCORERS
from circuitlens.utils import progress
from circuitlens.utils.progress import RunClock

RATES = [1e-3, 3e-3]


@pytest.fixture(scope="module")
def few(toy_task):
    """The toy task with pools of different sizes."""
    sizes = {"pool_a": 60, "pool_b": 20, "validation": 24, "test": 16}
    pools = {name: toy_task[name][:n] for name, n in sizes.items()}
    return replace(toy_task, pools=replace(toy_task.pools, **pools))


@pytest.fixture
def rows(monkeypatch):
    """Counts examples in forward passes, and those in training steps."""
    found: Counter[str] = Counter()
    run, run_hf = HookedModel.run, HookedModel.run_hf

    def hooked(self, batch, *rest, **options):
        found["forward"] += len(batch)
        return run(self, batch, *rest, **options)

    def native(self, batch, module=None, **options):
        found["forward"] += len(batch)
        found["trained"] += len(batch) * (module is not None)
        return run_hf(self, batch, module, **options)

    monkeypatch.setattr(HookedModel, "run", hooked)
    monkeypatch.setattr(HookedModel, "run_hf", native)
    return found


def taken(rows):
    now = Counter(rows)
    rows.clear()
    return now["forward"], now["trained"]


def test_a_plan_counts_what_a_run_does(toy_proxy, few, rows):
    training = TRANSFER.updated({"epochs": 3})
    finetuning = COMPETENCE.updated({"epochs": 2})
    planned = cl.plan(
        toy_proxy,
        few,
        ["near"],
        finetuning=finetuning,
        sizes=[2, 0.5],
        n_random=3,
        strategies=["circuit", "gradual", "full"],
        learning_rates=RATES,
        training=training,
        retain=["far"],
        probe=False,
    )
    stages = {stage.name: stage for stage in planned.stages}
    assert math.isnan(planned.seconds)
    # Oracle: the run itself.
    cl.finetune(toy_proxy, few, training=finetuning, quiet=True)
    competence = stages["competence"]
    assert taken(rows) == (competence.forward, competence.backward) == (2 * 84, 2 * 60)

    baseline = cl.label_balanced_mean(toy_proxy, few, quiet=True)
    assert taken(rows)[0] == stages["baseline"].forward == 60
    scores = cl.relevance(toy_proxy, few, baseline, quiet=True)
    right = len(baseline.example_ids)
    assert taken(rows)[0] == right <= stages["relevance"].forward == 60
    assert stages["relevance"].backward == 60

    cl.faithfulness(toy_proxy, few, scores, baseline, sizes=[2, 0.5], n_random=3, quiet=True)
    forward = taken(rows)[0]
    # Equal circuits are run once, and that of all heads is the clean run.
    assert 0.6 * stages["faithfulness"].forward < forward <= stages["faithfulness"].forward

    near = few.to("near")
    cut = {name: near[name][: len(few[name])] for name in ("pool_b", "validation", "test")}
    near = replace(near, pools=replace(near.pools, **cut))
    far = few.to("far")
    for strategy in ("circuit", "full"):
        cl.transfer(
            toy_proxy, scores.top(2), near, strategy=strategy, learning_rates=RATES,
            training=training, source=few, retain=[far], quiet=True,
        )  # fmt: skip
        forward, trained = taken(rows)
        assert trained == 2 * 3 * 20
        # Validation before and after each epoch, and at four points of each way; that of the
        # others before and at four; tests before and after. The plan counts up to 100 of
        # their texts besides.
        ways = 15 * 24 + 9 * (24 + len(far["validation"]))
        texts = 2 * (16 + 100)
        assert forward == trained + ways + 2 * (16 + 16 + len(far["test"]))
        stage = stages[f"transfer to near, {strategy}"]
        # The plan has the pools of the language as they are.
        whole = few.to("near")
        assert stage.backward == 2 * 3 * len(whole["pool_b"])
        ways = 15 * len(whole["validation"]) + 9 * (24 + len(far["validation"]))
        tests = 2 * (len(whole["test"]) + 16 + len(far["test"]))
        assert stage.forward == stage.backward + ways + tests + texts
    assert stages["transfer to near, full"].memory > stages["transfer to near, circuit"].memory


@pytest.mark.parametrize("method", ["cdt-linear", "ablation", "integrated-gradients", "dla", "cdt"])
@pytest.mark.parametrize("mlps", [False, True])
def test_scorers_take_no_more_passes_than_they_say(toy_proxy, few, rows, method, mlps):
    baseline = cl.label_balanced_mean(toy_proxy, few, quiet=True)
    rows.clear()
    scores = cl.relevance(toy_proxy, few, baseline, method=method, mlps=mlps, quiet=True)
    planned = cl.plan(toy_proxy, few, method=method, mlps=mlps, probe=False)
    (stage,) = [s for s in planned.stages if s.name == "relevance"]
    share = len(scores.example_ids) / len(few["pool_a"])
    assert 0 < taken(rows)[0] <= 2 * stage.forward * share


def test_every_scorer_says_what_it_takes(toy_proxy, few):
    for name in SCORERS:
        planned = cl.plan(toy_proxy, few, method=name, probe=False)
        (stage,) = [s for s in planned.stages if s.name == "relevance"]
        assert (stage.forward > 0) == (name != "random")


def test_a_probe_measures_time_and_memory(toy_proxy, few):
    both = cl.plan(toy_proxy, few, ["near"], strategies=["circuit", "full"]).stages[-2:]
    assert both[1].seconds > both[0].seconds
    planned = cl.plan(toy_proxy, few, ["near"], strategies=["circuit"], seeds=2)
    once = cl.plan(toy_proxy, few, ["near"], strategies=["circuit"])
    assert all(stage.seconds > 0 for stage in planned.stages)
    assert planned.stages[-1].backward == 2 * once.stages[-1].backward
    table = planned.to_frame()
    assert list(table["stage"]) == [
        "baseline", "relevance", "faithfulness", "transfer to near, circuit"
    ]  # fmt: skip
    assert "GiB of memory" in str(planned)
    assert "faithfulness" in planned._repr_html_()
    # Nothing of it is left on the model.
    assert all(p.grad is None and p.requires_grad for p in toy_proxy.hf.parameters())


def test_weights_in_16_bits_that_are_trained_are_planned_in_float32(toy_proxy, few):
    half = toy_proxy.clone()
    half.hf.to(torch.bfloat16)
    n = sum(p.numel() for p in half.hf.parameters())
    needs = {
        name: cl.plan(half, few, ["near"], strategies=[name], probe=False).stages[-1].memory
        for name in ("circuit", "full")
    }
    assert needs["circuit"] == 2 * 2 * n
    assert needs["full"] == 2 * n + 28 * n


def test_what_does_not_fit_is_said_before_it_starts(toy_proxy, few, monkeypatch, tmp_path):
    class Memory:
        available = 2e6

    planned = cl.plan(toy_proxy, few, ["near"], strategies=["circuit", "full"], probe=False)
    planned.check()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    planned = cl.plan(toy_proxy, few, ["near"], strategies=["circuit", "full"], probe=False)
    message = r"Transfer to near, full needs about \d+\.\d GiB .* cpu has .* leave out strategies"
    with pytest.raises(cl.InputError, match=message):
        planned.check()
    from circuitlens.run_folder import RunFolder
    from circuitlens.run_settings import RunSettings

    settings = RunSettings("toy", "toy", targets=("near",), strategies=("full",))
    with pytest.raises(cl.InputError, match="Transfer, full needs about"):
        RunFolder.create(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()
    planning.check_memory(toy_proxy, ("circuit",), finetunes=False)


def test_bars_tell_what_is_left_of_the_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    clock = RunClock()
    clock.begin({"first": 10.0, "there": 100.0, "second": 20.0, "third": 30.0})
    assert clock.left(0.0) == 160
    with clock.stage("first"):
        assert clock.left(5.0) == 155
        now[0] += 20  # twice as long as planned, as the others will take
    assert clock.left(0.0) == 2 * 150
    with clock.stage("nobody planned this"):
        pass
    with clock.stage("second"):  # what comes before was there already
        assert clock.left(7.0) == 7 + 2 * 30
        seen = []

        class Bar:
            format_dict = {"n": 2, "total": 6, "elapsed": 10.0}  # noqa: RUF012

            def set_postfix_str(self, text, refresh):
                seen.append(text)

        progress.tell_run(Bar())
        assert seen == ["run: 80 seconds left"]  # 4 × 5 s here, 2 × 30 s after it
    clock.skip("third")
    assert clock.left(0.0) == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.2, "4 seconds"), (150.0, "2 minutes"), (3e3, "50 minutes"), (9e3, "2.5 hours")],
)
def test_times_are_said_in_words(seconds, words):
    assert progress.spoken(seconds) == words


def test_the_clock_of_a_run_knows_the_stages_of_its_plan(toy_proxy, tmp_path, monkeypatch):
    from circuitlens.run_folder import RunFolder
    from circuitlens.run_settings import RunSettings

    toy_proxy.save(tmp_path / "model")
    settings = RunSettings(str(tmp_path / "model"), "toy", max_examples=10, n_random=1, size=2)
    run, seen = RunFolder.create(tmp_path / "run", settings, quiet=True), []
    kept = run._clock.stage
    monkeypatch.setattr(run._clock, "stage", lambda name: (seen.append(name), kept(name))[1])
    run.run_all()
    assert {s.name for s in run.plan().stages} <= set(seen)
