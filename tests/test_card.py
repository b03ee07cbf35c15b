from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel

import circuitlens as cl
from circuitlens.adapt import result as module


@pytest.fixture(scope="module")
def result(toy_proxy, toy_task, toy_scores):
    return cl.transfer(
        toy_proxy, toy_scores.top(3), toy_task.to("near"), learning_rates=[3e-3], epochs=1
    )


def test_the_card_has_circuit_data_figures_and_licence_notes(tmp_path, result, toy_proxy):
    result.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
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
    assert card.data.library_name == "transformers"
    assert "not about heads" in card.text


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
    }

    class Refusing(Api):
        def create_repo(self, repo_id, private, exist_ok):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "HfApi", Refusing)
    with pytest.raises(cl.InputError, match=r"me/near failed \(no route to host\): check the name"):
        result.push_to_hub("me/near")
