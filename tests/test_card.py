from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import loaded
from huggingface_hub import ModelCard
from peft import PeftModel

import circuitlens as cl
from circuitlens.adapt import result as module
from circuitlens.adapt.card import model_card
from circuitlens.models.weights import load_weights

OPTIONS = {"learning_rates": [1e-2], "epochs": 3, "quiet": True}


def saved_card(result, folder):
    """The card, and the base that PEFT would load the adapter with."""
    result.save(folder)
    config = folder / "adapter_config.json"
    base = json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else None
    return ModelCard.load(folder / "README.md"), base


def said(result, card):
    """The sentence on the base, up to what to do about it."""
    text = card.text.replace("\n", " ")
    match = re.search(r"How to use +(Th.*?) \(fingerprint `(\w+)`\)", text)
    assert match[2] == result.provenance.model_fingerprint
    return match[1]


@pytest.fixture(scope="module")
def result(toy_proxy, toy_task, toy_scores):
    return cl.transfer(
        toy_proxy, toy_scores.top(3), toy_task.to("near"), learning_rates=[3e-3], epochs=1
    )


def test_the_card_has_circuit_data_figures_and_licence_notes(tmp_path, result, toy_proxy):
    result.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None
    assert {"circuitlens", "circuit"} <= set(card.data.tags)
    figures = {e.dataset_name: e.metric_value for e in card.data.eval_results}
    assert figures["toy/near"] == pytest.approx(result.target_after.accuracy, abs=1e-4)
    assert figures["toy/source"] == pytest.approx(result.source_after.accuracy, abs=1e-4)
    for head in result.heads:
        assert str(head) in card.text
    for part in ("## Licence", "read the licences of both", result.provenance.model_fingerprint):
        assert part.replace("\n", " ") in card.text.replace("\n", " ")
    assert f"{result.target_before.accuracy:.3f}" in card.text
    # PEFT reads the folder as it stands.
    adapter = PeftModel.from_pretrained(toy_proxy.clone().hf, str(tmp_path))
    assert adapter.peft_config["default"].heads == tuple(map(str, result.heads))


def test_the_card_of_full_weights_is_no_adapters(tmp_path, toy_proxy, toy_task, toy_scores):
    full = cl.transfer(
        toy_proxy,
        toy_scores.top(3),
        toy_task.to("near"),
        strategy="full",
        learning_rates=[1e-3],
        epochs=1,
    )
    full.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "circuitlens"
    assert card.data.base_model is None
    assert "not about heads" in card.text


@pytest.fixture
def hub(monkeypatch, tmp_path, toy_proxy):
    """A hub on which the proxy is ``someone/toy``."""
    toy_proxy.save(tmp_path / "hub")

    def stand_in(name, dtype, revision, *_, **__):
        hf, new = load_weights(str(tmp_path / "hub"), dtype, revision)
        hf.name_or_path = hf.config.name_or_path = name
        return hf, new

    monkeypatch.setattr("circuitlens.models.loading.load_weights", stand_in)
    monkeypatch.setattr(
        "circuitlens.models.loading.load_tokenizer", lambda *_, **__: toy_proxy.tokenizer
    )
    return "someone/toy"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["circuit", "head"])
def test_a_model_of_the_hub_is_the_base_until_it_is_trained(
    tmp_path, hub, toy_task, toy_scores, strategy
):
    def adapt(model):
        near = toy_task.to("near")
        return cl.transfer(model, toy_scores.top(3), near, strategy=strategy, **OPTIONS)

    model = cl.load(hub)
    result = adapt(model)
    card, base = saved_card(result, tmp_path / "r")
    assert card.data.base_model == hub
    assert base == (None if strategy == "head" else hub)
    assert said(result, card).endswith(" to [someone/toy](https://huggingface.co/someone/toy)")
    # Loading keeps it, without the model too.
    again = cl.TransferResult.load(tmp_path / "r", model)
    assert saved_card(again, tmp_path / "again")[0].data.base_model == hub

    few = {"epochs": 1, "batch_size": 512, "learning_rate": 1e-4}
    proxy = cl.finetune(model, toy_task, **few, quiet=True)
    assert (proxy.name, proxy.fingerprint() == model.fingerprint()) == (hub, False)
    assert (proxy.clone().origin, model.origin) == ("fine-tuned", "hub")
    result = adapt(proxy)
    card, base = saved_card(result, tmp_path / "r")
    assert card.data.base_model is base is None
    assert said(result, card).endswith("to fine-tuned weights, trained from `someone/toy`")
    again = cl.TransferResult.load(tmp_path / "r", proxy)
    assert saved_card(again, tmp_path / "again")[0].text == card.text

    # Adapted weights are no base of that name either.
    for adapted in (result.model, again.model):
        assert adapted.origin == "adapted"


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch, toy_proxy, toy_task, toy_scores):
    toy_proxy.save(tmp_path / "models" / "toy")
    monkeypatch.chdir(tmp_path)
    model = cl.load("models/toy")
    result = cl.transfer(model, toy_scores.top(3), toy_task.to("near"), **OPTIONS)
    # Seen from elsewhere, the folder is not there.
    shutil.rmtree("models")
    card, base = saved_card(result, tmp_path / "r")
    assert card.data.base_model is None
    # Nor is it told to others; here it is known.
    assert not base
    assert result.trained.checkpoint == str(tmp_path / "models" / "toy")
    assert said(result, card) == "This adapter belongs to the weights in the folder `models/toy`"


@pytest.mark.parametrize(
    ("begin", "sentence"),
    [
        ("memory", "a model named `someone/toy` that was given in memory"),
        ("revision", "the weights of `someone/toy`, revision step10"),
        ("adapted", "weights that an earlier transfer made of `someone/toy`"),
    ],
)
def test_other_weights_under_a_name_of_the_hub_are_not_that_base(
    tmp_path, hub, result, toy_proxy, toy_task, toy_scores, begin, sentence
):
    if begin == "memory":
        hf = toy_proxy.clone().hf
        hf.name_or_path = hf.config.name_or_path = hub
        model = cl.load(hf, toy_proxy.tokenizer)
    else:
        model = cl.load(hub, revision=None if begin == "adapted" else "step10")
    if begin == "adapted":
        result.save(tmp_path / "first")
        model = cl.TransferResult.load(tmp_path / "first", model).model
    second = cl.transfer(model, toy_scores.top(3), toy_task.to("near"), **OPTIONS)
    card, base = saved_card(second, tmp_path / "r")
    assert card.data.base_model is base is None
    assert said(second, card).endswith(sentence)


@pytest.mark.parametrize(
    ("strategy", "replay", "mixed"),
    [
        ("norms", 0, ""),
        ("norms", 0.5, " (up to 0.5 for each of the target's)"),
        ("gradual", 0, " (in stages, fewer in each, down to none)"),
        ("gradual", 0.5, " (in stages, fewer in each, down to 0.5 for each of the target's)"),
    ],
)
def test_the_card_names_all_training_data(result, strategy, replay, mixed):
    settings = result.provenance.settings | {"replay": replay}
    provenance = replace(result.provenance, settings=settings)
    card = model_card(replace(result, strategy=strategy, provenance=provenance))
    pools = re.search(r"Trained on the training pool of (.*?)\. The learning", card.text)[1]
    source = mixed and f" and on examples from the training pool of toy/source{mixed}"
    assert pools == f"toy/near{source}"


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("strategy", ["circuit", "lora", "head"])
def test_the_code_in_the_card_loads_the_adapted_model(
    tmp_path, hub, monkeypatch, toy_proxy, toy_task, toy_scores, strategy, where
):
    model = cl.load(hub, dtype="float64") if where == "hub" else toy_proxy
    near = toy_task.to("near")
    result = cl.transfer(model, toy_scores.top(3), near, strategy=strategy, **OPTIONS)
    card, _ = saved_card(result, tmp_path / "r")
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    assert ("headslice" in code) == (strategy == "circuit")
    assert ("circuitlens" in code) == (strategy != "lora")
    places = {"path/to/this/folder": tmp_path / "r"}
    if where == "folder":
        toy_proxy.save(tmp_path / "base")
        places["path/to/base"] = tmp_path / "base"
    elif strategy != "head":
        # transformers knows no such hub.
        places[hub] = tmp_path / "hub"
    for placeholder, path in places.items():
        assert code.count(f'"{placeholder}"') == 1
        code = code.replace(placeholder, str(path))
    names: dict[str, object] = {}
    exec(code, names)
    encoded = near.encode(toy_proxy, near["test"][:8])
    batch = encoded.batch(range(8), toy_proxy.device)
    after = result.model.hf_logits(batch)
    torch.testing.assert_close(result.model.hf_logits(batch, names["model"]), after)
    assert not torch.allclose(model.hf_logits(batch), after, atol=1e-3)


def test_the_code_loads_encoders_as_what_they_are(result):
    card = model_card(replace(result, model=loaded("bert")))
    assert "AutoModelForMaskedLM.from_pretrained" in card.text
    assert "AutoModelForCausalLM" not in card.text


def test_pushing_uploads_the_saved_folder(monkeypatch, result):
    uploaded: dict[str, object] = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            uploaded["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded["files"] = {p.name for p in Path(folder_path).iterdir()}
            return "https://example.org/commit"

    monkeypatch.setattr(module, "HfApi", Api)
    assert result.push_to_hub("me/near", token="t") == "https://example.org/commit"
    assert uploaded["repo"] == ("me/near", True, True)
    assert uploaded["files"] == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "result.json",
        "trained.json",
    }

    class Refusing(Api):
        def create_repo(self, repo_id, private, exist_ok):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "HfApi", Refusing)
    with pytest.raises(cl.InputError, match=r"me/near failed \(no route to host\): check the name"):
        result.push_to_hub("me/near")


def test_an_interrupted_training_in_place_leaves_no_checkpoint_of_that_name(
    monkeypatch, hub, toy_task
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = cl.load(hub)
    monkeypatch.setattr(sys.modules["circuitlens.adapt.competence"], "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cl.finetune(model, toy_task, inplace=True)
    assert model.origin == "fine-tuned"
