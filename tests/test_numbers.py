"""Numbers that hold: float64, hooks that act, and a caller whose state stays as it was."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    CONFIGS,
    MASKED,
    batch_of,
    loaded,
    node_means,
    quick_or_slow,
    shortened,
    tiny,
)
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import circuitlens as cl
from circuitlens.cdt import RULES, relevance_by_difference

# Families whose own attention takes its softmax in float64 when asked to.
EXACT = {"gpt2", "falcon_new", "falcon_mq", "falcon_rw"} | (MASKED - {"modernbert"})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [quick_or_slow(name) for name in ALL])
def test_float64_gives_numbers_for_padded_prompts_or_is_refused(name, attention):
    config = CONFIGS[name]()
    config._attn_implementation = attention
    # The default implementation of experts knows no float64.
    options = {"experts_implementation": "eager"} if name in ("mixtral", "qwen3_moe") else {}
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    try:
        hf = auto.from_config(config, attn_implementation=attention, **options).double()
    except ValueError:
        pytest.skip(f"{name} has no {attention} attention")
    exact = attention == "sdpa" or name in EXACT
    if not exact or name == "opt":
        with pytest.raises(cl.UnsupportedModelError, match="float32") as refused:
            cl.load(hf)
        assert "float16" not in str(refused.value)
        return
    model = cl.load(hf)
    batch = batch_of(model, 7, 4)
    with torch.no_grad():
        native = model.hf_logits(batch)
        assert native.isfinite().all()
        torch.testing.assert_close(model.logits(batch), native, rtol=1e-6, atol=1e-8)


def test_experts_that_know_no_float64_say_so():
    hf = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]()).double()
    with pytest.raises(cl.UnsupportedModelError, match="load it in float32"):
        cl.load(hf)


def test_float64_is_refused_where_softmax_cannot_be_reached():
    with pytest.raises(cl.UnsupportedModelError, match="load it in float32"):
        cl.load(tiny("opt", torch.float64))


@pytest.mark.parametrize("name", [quick_or_slow(name) for name in ALL])
def test_frozen_and_live_norms_give_different_scores(name):
    """A hook that silently did nothing would make them equal."""
    model = loaded(name)
    batch, means = batch_of(model, 8, 5), node_means(model)
    frozen = relevance_by_difference(model, batch, means, RULES["cdt"]).heads
    live = relevance_by_difference(model, batch, means, RULES["cdt-live"]).heads
    assert (frozen - live).abs().max() > 1e-6 * frozen.abs().max()


def state_of(model: cl.HookedModel) -> dict[str, object]:
    """All that a verb could leave changed behind it."""
    modules = dict(model.hf.named_modules())
    loggers = {"": logging.getLogger(), **logging.root.manager.loggerDict}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "weights": {
            name: (p.data_ptr(), p.requires_grad, p.grad is None, p._version)
            for name, p in model.hf.named_parameters()
        },
        "values": model.fingerprint(),
        "hooks": {name: [len(getattr(m, h)) for h in hooks] for name, m in modules.items()},
        "kinds": {name: type(module) for name, module in modules.items()},
        "config": model.hf.config.to_dict(),
        "attention": model.hf.config._attn_implementation,
        "padding": model.tokenizer.padding_side,
        # Not Python's own random numbers: the type checks of the tests draw some.
        "numpy's random": np.random.get_state()[1].tolist(),
        "torch's random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "logging": {
            name: (log.level, log.disabled, list(log.handlers))
            for name, log in loggers.items()
            if isinstance(log, logging.Logger)
        },
        "interrupt": signal.getsignal(signal.SIGINT),
    }


def unchanged(before, after):
    for key, value in before.items():
        if isinstance(value, dict):
            # Loggers of modules that were imported meanwhile are no change.
            found = {name: after[key].get(name) for name in value}
            different = [name for name in value if found[name] != value[name]]
            assert not different, (key, different[:5])
        else:
            assert after[key] == value, key


LITTLE = {"max_examples": 12, "quiet": True}
TRAINING = {"epochs": 1, "batch_size": 16, "learning_rates": [1e-3], "quiet": True}


class Given:
    """What the verbs are called with."""

    def __init__(self, model, task, baseline, scores):
        self.model, self.task, self.baseline, self.scores = model, task, baseline, scores
        self.circuit = scores.top(3)
        self.target = shortened(task.to("near"), 30)
        self.few = task["validation"][:12]


def scoring(method):
    return lambda g: cl.relevance(g.model, g.task, g.baseline, method=method, **LITTLE)


def adapting(strategy):
    return lambda g: cl.transfer(
        g.model, g.circuit, g.target, strategy=strategy, scores=g.scores, **TRAINING
    )


VERBS = {
    "evaluate": lambda g: cl.evaluate(g.model, g.task, g.few, quiet=True),
    "predict": lambda g: cl.predict(g.model, [g.few[0].fields["text"]], quiet=True),
    "label_balanced_mean": lambda g: cl.label_balanced_mean(
        g.model, g.task, examples=g.task["pool_a"][:60], quiet=True
    ),
    **{f"relevance {m}": scoring(m) for m in ("cdt", "cdt-linear", "ablation", "iterative")},
    "neuron_relevance": lambda g: cl.neuron_relevance(g.model, g.task, g.baseline, **LITTLE),
    "discover": lambda g: cl.discover(g.model, g.task, g.baseline, **LITTLE),
    "faithfulness": lambda g: cl.faithfulness(
        g.model, g.task, g.scores, g.baseline, sizes=[2], n_random=2, examples=g.few, quiet=True
    ),
    "minimality": lambda g: cl.minimality(
        g.model, g.task, g.circuit, g.baseline, examples=g.few, quiet=True
    ),
    "head_effects": lambda g: cl.head_effects(g.model, g.task, g.circuit, g.baseline, **LITTLE),
    "head_roles": lambda g: cl.head_roles(g.model, g.task, g.circuit, g.baseline, **LITTLE),
    "margin_by_layer": lambda g: cl.margin_by_layer(g.model, g.task, examples=g.few, quiet=True),
    "smallest_circuit": lambda g: cl.smallest_circuit(
        g.model, g.task, g.scores, g.baseline, **LITTLE
    ),
    "compare_scorers": lambda g: cl.compare_scorers(
        g.model, g.task, g.baseline, methods=["dla"], n_random=2, **LITTLE
    ),
    "plan": lambda g: cl.plan(g.model, g.task, ["near"]),
    "finetune": lambda g: cl.finetune(g.model, shortened(g.task, 30), epochs=1, quiet=True),
    **{
        f"transfer {s}": adapting(s)
        for s in ("circuit", "lora", "full", "head-scale", "shield", "neurons", "fisher")
    },
    "compare": lambda g: cl.compare(
        g.model,
        g.circuit,
        shortened(g.task, 30),
        ["near"],
        strategies=["norms"],
        seeds=[0],
        **TRAINING,
    ),
}


@pytest.fixture
def given(toy_proxy, toy_task, toy_baseline, toy_scores):
    """A model in a state that no verb would choose."""
    modules, parameters = list(toy_proxy.hf.modules()), list(toy_proxy.hf.parameters())
    for place, module in enumerate(modules):
        module.training = place % 3 == 0
    for place, parameter in enumerate(parameters):
        parameter.requires_grad_(place % 2 == 0)
    np.random.seed(2)
    torch.manual_seed(3)
    yield Given(toy_proxy, toy_task, toy_baseline, toy_scores)
    toy_proxy.hf.eval()
    for parameter in parameters:
        parameter.requires_grad_(True)


# One of each kind at once, the others among the long tests.
QUICK = ("evaluate", "label_balanced_mean", "relevance cdt-linear", "transfer circuit", "discover")


@pytest.mark.parametrize(
    "verb",
    [pytest.param(v, marks=[] if v in QUICK else [pytest.mark.slow]) for v in VERBS],
)
def test_a_verb_leaves_everything_as_it_was_also_where_it_fails(verb, given, monkeypatch):
    calls, limit = [], float("inf")
    embedding = torch.nn.functional.embedding

    def failing(*args, **options):
        calls.append(1)
        if len(calls) >= limit:
            raise KeyboardInterrupt
        return embedding(*args, **options)

    before = state_of(given.model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", failing)
        VERBS[verb](given)
        unchanged(before, state_of(given.model))
        assert calls
        limit = 1 + len(calls) // 2
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            VERBS[verb](given)
    unchanged(before, state_of(given.model))
