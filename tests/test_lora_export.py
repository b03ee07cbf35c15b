"""Head slices as plain LoRA, and what of a machine leaves it with a result."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import shortened, tiny
from peft import PeftModel

import circuitlens as cl
from circuitlens.adapt.headslice import HeadSliceConfig
from circuitlens.adapt.lora_export import write_lora
from circuitlens.adapt.trainable import Trainable

FAST = {"learning_rates": [3e-3], "epochs": 2, "quiet": True}
FAMILIES = ("qwen2", "gpt2", "phi3", "bloom", "gpt_neox", "opt", "llama")


def tokens() -> torch.Tensor:
    return torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def filled(base, **options) -> Trainable:
    heads = ("a0.h1", "a2.h0", "a2.h1", "a2.h3")
    trainable = Trainable.of_adapter(base, HeadSliceConfig(heads=heads, **options), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in trainable.parameters.values():
            leaf.copy_(0.1 * torch.randn(leaf.shape, generator=generator))
    return trainable


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_peft_reads_all_of_it(name, tmp_path):
    base = cl.load(tiny(name))
    trainable = filled(base)
    before = base.fingerprint()
    export = write_lora(trainable, base, tmp_path, beside=True)
    assert export.exact
    assert base.fingerprint() == before
    plain = PeftModel.from_pretrained(tiny(name), str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(trainable.model.hf), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(plain), logits(base.hf), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_norms_and_biases_only_the_maps_move(name, tmp_path):
    base = cl.load(tiny(name))
    export = write_lora(filled(base), base, tmp_path, beside=False)
    assert not export.exact
    assert not export.beside
    assert set(export.left_out) >= {n for n in export.left_out if "norm" in n}
    slices = filled(base, norms="none", biases=False)
    # The same leaves of the maps: norms and biases come after them in the file's order.
    whole = dict(filled(base).model.hf.named_parameters())
    with torch.no_grad():
        for key, leaf in slices.parameters.items():
            leaf.copy_(whole[key])
    plain = PeftModel.from_pretrained(tiny(name), str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(slices.model.hf), atol=1e-5, rtol=1e-4)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(slices.model.hf), atol=1e-5, rtol=1e-4)


def test_ranks_are_those_of_the_heads_and_no_more_than_the_matrix_has(tmp_path):
    base = cl.load(tiny("qwen2"))
    g = base.geometry
    export = write_lora(filled(base), base, tmp_path / "a", beside=False)
    assert {r % g.d_head for r in export.ranks.values()} == {0}
    assert max(export.ranks.values()) == 3 * g.d_head
    every = HeadSliceConfig(heads=tuple(map(str, g)), norms="none")
    trainable = Trainable.of_adapter(base, every, 0)
    with torch.no_grad():
        for leaf in trainable.parameters.values():
            leaf.normal_(0, 0.1)
    export = write_lora(trainable, base, tmp_path / "b", beside=True)
    for path, rank in export.ranks.items():
        assert rank <= min(base.hf.get_submodule(path).weight.shape)
    plain = PeftModel.from_pretrained(tiny("qwen2"), str(tmp_path / "b"))
    torch.testing.assert_close(logits(plain), logits(trainable.model.hf), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["circuit", "head-scale", "head-bias"])
def test_a_transfer_is_written_as_lora(toy_proxy, toy_task, toy_scores, strategy, tmp_path):
    near = shortened(toy_task.to("near"))
    result = cl.transfer(
        toy_proxy, toy_scores.top(3), near, strategy=strategy, scores=toy_scores, **FAST
    )
    result.save(tmp_path / "result")
    if strategy == "head-bias":
        with pytest.raises(cl.InputError, match="no slices of heads"):
            result.save_as_lora(tmp_path / "lora", toy_proxy)
        return
    again = cl.TransferResult.load(tmp_path / "result")
    export = again.save_as_lora(tmp_path / "lora", toy_proxy)
    assert export.exact
    code = (
        "import sys, torch; from peft import PeftModel; "
        "from transformers import AutoModelForCausalLM as A; "
        "m = PeftModel.from_pretrained(A.from_pretrained(sys.argv[1]), sys.argv[2]); "
        "assert 'circuitlens' not in sys.modules; "
        "ids = torch.arange(5, 12)[None]; "
        "torch.save(m(input_ids=ids).logits.detach(), sys.argv[3])"
    )
    toy_proxy.save(tmp_path / "base")
    out = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "base", tmp_path / "lora", out], check=True
    )
    with torch.no_grad():
        ours = result.model.hf(input_ids=torch.arange(5, 12)[None]).logits
    torch.testing.assert_close(torch.load(out), ours, atol=1e-4, rtol=1e-4)


def test_what_is_no_slice_or_another_model_is_refused(toy_proxy, toy_task, toy_scores, tmp_path):
    near = shortened(toy_task.to("near"))
    for strategy in ("full", "lora"):
        result = cl.transfer(toy_proxy, toy_scores.top(3), near, strategy=strategy, **FAST)
        with pytest.raises(cl.InputError, match="Only adapters on slices of heads"):
            result.save_as_lora(tmp_path, toy_proxy)
    options = {**FAST, "epochs": 6}
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, **options)
    with pytest.raises(cl.InputError, match="other weights"):
        result.save_as_lora(tmp_path, result.model)
    with pytest.raises(cl.InputError, match="no trained tensors"):
        replace(result, folder=None, _scratch=None).save_as_lora(tmp_path, toy_proxy)


def test_no_place_of_this_machine_is_published(
    toy_proxy, toy_task, toy_scores, tmp_path, monkeypatch
):
    base = tmp_path / "secret-place" / "my-model"
    toy_proxy.save(base)
    model = cl.load(base)
    near = shortened(toy_task.to("near"))
    for strategy in ("circuit", "lora", "full"):
        result = cl.transfer(model, toy_scores.top(3), near, strategy=strategy, **FAST)
        folder = tmp_path / strategy
        result.save(folder)
        if strategy == "circuit":
            result.save_as_lora(tmp_path / "lora", model)
        for name in ("README.md", "adapter_config.json"):
            if (folder / name).is_file():
                assert "secret-place" not in (folder / name).read_text(encoding="utf-8")
        assert "my-model" in (folder / "README.md").read_text(encoding="utf-8")
        # Here it is still known where the base is.
        found = cl.load(folder)
        assert found.fingerprint() == result.model.fingerprint()
        uploaded = {}

        class Api:
            def __init__(self, **_):
                pass

            def create_repo(self, *_, **__):
                pass

            def upload_folder(self, *, folder_path, uploaded=uploaded, **_):
                from pathlib import Path

                uploaded |= {
                    p.name: p.read_bytes().decode("utf-8", "replace")
                    for p in Path(folder_path).iterdir()
                }
                return "done"

        monkeypatch.setattr("circuitlens.adapt.result.HfApi", Api)
        result.push_to_hub("me/it")
        assert uploaded
        for name, content in uploaded.items():
            assert "secret-place" not in content, name
        json.loads(uploaded["result.json"])
    assert "secret-place" not in (tmp_path / "lora" / "adapter_config.json").read_text()
    assert cl.load(tmp_path / "lora").fingerprint()
