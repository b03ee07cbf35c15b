"""What a saved result holds, and what becomes of a folder that is saved into twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import circuitlens as cl
from circuitlens.adapt import result as module

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
ENTRIES = {"weights.safetensors"}
OPTIONS = {"learning_rates": [3e-3], "epochs": 1, "quiet": True}


@pytest.fixture(scope="module")
def adapter(toy_proxy, toy_task, toy_scores):
    return cl.transfer(toy_proxy, toy_scores.top(3), toy_task.to("near"), **OPTIONS)


@pytest.fixture(scope="module")
def entries(toy_proxy, toy_task, toy_scores):
    return cl.transfer(
        toy_proxy, toy_scores.top(3), toy_task.to("near"), strategy="head", **OPTIONS
    )


# Beside the trained tensors: numbers, what the tensors are, and the card.
RECORDS = {"result.json", "trained.json", "README.md"}


def files(folder):
    return {path.name for path in folder.iterdir()}


def forget_kind(folder):
    """Make the folder one that was saved before the kind was recorded."""
    content = json.loads((folder / "result.json").read_text())
    del content["trained"], content["checksum"]
    (folder / "result.json").write_text(json.dumps(content))
    (folder / "trained.json").unlink()


@pytest.mark.parametrize("first", ["adapter", "entries"])
def test_a_result_replaces_one_of_the_other_kind(tmp_path, toy_proxy, adapter, entries, first):
    old, new, kept = (
        (adapter, entries, ENTRIES) if first == "adapter" else (entries, adapter, ADAPTER)
    )
    old.save(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    (tmp_path / "notes.txt").write_text("mine")
    new.save(tmp_path)
    assert files(tmp_path) == {*RECORDS, "notes.txt"} | kept
    again = cl.TransferResult.load(tmp_path, toy_proxy)
    assert again == new
    assert again.model.fingerprint() == new.model.fingerprint() != old.model.fingerprint()
    assert again.is_adapter == new.is_adapter == (first == "entries")


def test_the_kind_is_read_and_not_guessed(tmp_path, toy_proxy, adapter, entries):
    adapter.save(tmp_path / "adapter")
    entries.save(tmp_path / "entries")
    for name in ADAPTER:
        (tmp_path / "entries" / name).write_bytes((tmp_path / "adapter" / name).read_bytes())
    again = cl.TransferResult.load(tmp_path / "entries", toy_proxy)
    assert not again.is_adapter
    assert again.model.fingerprint() == entries.model.fingerprint()
    # Nor are the strange files carried on.
    again.save(tmp_path / "copy")
    assert files(tmp_path / "copy") == RECORDS | ENTRIES
    again.save(tmp_path / "entries")
    assert files(tmp_path / "entries") == RECORDS | ENTRIES
    assert cl.TransferResult.load(tmp_path / "entries", toy_proxy) == entries


@pytest.mark.parametrize("kind", ["adapter", "entries"])
def test_results_from_before_the_kind_was_recorded_load(
    tmp_path, toy_proxy, adapter, entries, kind
):
    result = adapter if kind == "adapter" else entries
    result.save(tmp_path / "old")
    forget_kind(tmp_path / "old")
    again = cl.TransferResult.load(tmp_path / "old", toy_proxy)
    assert again.model.fingerprint() == result.model.fingerprint()
    assert again.is_adapter == result.is_adapter
    assert again.trained.kind == result.trained.kind
    # Where nothing says which weights were trained from, the card claims nothing.
    again.save(tmp_path / "new")
    assert "base_model:" not in (tmp_path / "new" / "README.md").read_text()
    assert cl.TransferResult.load(tmp_path / "new") == again


def test_a_folder_without_the_tensors_is_no_result_to_go_on_with(
    tmp_path, toy_proxy, adapter, entries
):
    adapter.save(tmp_path / "r")
    loaded = cl.TransferResult.load(tmp_path / "r", toy_proxy)
    entries.save(tmp_path / "r")
    with pytest.raises(cl.InputError, match=r"r no longer has .* \(its adapter\)"):
        loaded.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (tmp_path / "r" / "weights.safetensors").unlink()
    assert not cl.TransferResult.load(tmp_path / "r").is_adapter
    with pytest.raises(cl.InputError, match=r"its weights\.safetensors"):
        cl.TransferResult.load(tmp_path / "r", toy_proxy)


def test_an_interrupted_save_leaves_no_old_numbers_beside_new_tensors(
    tmp_path, monkeypatch, adapter, entries
):
    adapter.save(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            entries.save(tmp_path)
    assert "result.json" not in files(tmp_path)
    entries.save(tmp_path)
    assert cl.TransferResult.load(tmp_path) == entries


def test_a_circuit_without_heads_is_kept(tmp_path, adapter, toy_proxy):
    empty = cl.Circuit((), toy_proxy.geometry.n_layers, toy_proxy.geometry.n_heads, "none at all")
    result = replace(adapter, heads=empty)
    result.save(tmp_path)
    assert cl.TransferResult.load(tmp_path).heads == empty
    assert "0 of 16 heads (none at all): none" in (tmp_path / "README.md").read_text()
    replace(adapter, heads=None).save(tmp_path)
    assert cl.TransferResult.load(tmp_path).heads is None
    assert "not about heads" in (tmp_path / "README.md").read_text()
