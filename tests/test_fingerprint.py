"""Fingerprints: of weights and of what else changes outputs; hashed again only where changed."""

from __future__ import annotations

import pytest
import torch
from helpers import ALL, CONFIGS, loaded, tiny

import circuitlens as cl
from circuitlens.models import fingerprint
from circuitlens.utils.peak_memory import PeakMemory
from circuitlens.utils.storage import digest


@pytest.fixture
def hashed(monkeypatch):
    """Parameters that were hashed, one entry each."""
    calls: list[torch.Tensor] = []
    real = fingerprint.digest

    def digest(*parts):
        calls.extend(p for p in parts if isinstance(p, torch.Tensor))
        return real(*parts)

    monkeypatch.setattr(fingerprint, "digest", digest)
    return calls


@pytest.mark.parametrize("name", ALL)
def test_it_survives_saving_and_copying(name, tmp_path):
    model = loaded(name)
    model.hf.save_pretrained(tmp_path)
    again = type(model.hf).from_pretrained(tmp_path, dtype=model.dtype)
    assert cl.HookedModel(again).fingerprint() == model.fingerprint()
    assert model.clone().fingerprint() == model.fingerprint()


def halve(p):
    p.mul_(0.5)


def halve_data(p):
    p.data.mul_(0.5)


def one_bit(p):
    p.data.view(torch.int32)[-1, -1] ^= 1


def swap_halves(p):
    p.data.copy_(p.data.flip(0))


def step(p):
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=1e-3).step()
    p.grad = None


def replace_storage(p):
    p.data = p.data * 2


@pytest.mark.parametrize("change", [halve, halve_data, one_bit, swap_halves, step, replace_storage])
def test_every_change_of_a_weight_is_seen_and_only_that_weight_is_hashed(change, hashed):
    model = cl.load(tiny("qwen2"))
    model.hf.resize_token_embeddings(5000)
    before = model.fingerprint()
    n_parameters = len(list(model.hf.parameters()))
    assert len(hashed) == n_parameters
    assert model.fingerprint() == before
    assert len(hashed) == n_parameters
    weight = model.hf.get_input_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        change(weight)
    assert not weight.equal(kept)
    assert model.fingerprint() != before
    assert len(hashed) == n_parameters + 1
    with torch.no_grad():
        weight.data.copy_(kept)
    assert model.fingerprint() == before


def test_a_copy_need_not_be_hashed_until_it_changes(hashed):
    model = cl.load(tiny("gpt2"))
    before = model.fingerprint()
    done = len(hashed)
    twin = model.clone()
    assert twin.fingerprint() == before
    assert len(hashed) == done
    with torch.no_grad():
        next(twin.hf.parameters()).add_(1)
    assert twin.fingerprint() != before == model.fingerprint()
    assert len(hashed) == done + 1


def test_what_changes_outputs_beside_the_weights_counts():
    model = cl.load(tiny("gemma2"))
    seen = {model.fingerprint()}
    for name, value in (("final_logit_softcapping", 7.0), ("rms_norm_eps", 0.5)):
        setattr(model.hf.config, name, value)
        seen.add(model.fingerprint())
    for module in model.hf.modules():
        if hasattr(module, "eps"):
            module.eps = 0.25
    seen.add(model.fingerprint())
    config = CONFIGS["qwen2"]()
    torch.manual_seed(0)
    plain = cl.HookedModel(type(tiny("qwen2"))(config))
    other = CONFIGS["qwen2"]()
    other.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    scaled = cl.HookedModel(type(tiny("qwen2"))(other))
    weights = zip(plain.hf.parameters(), scaled.hf.parameters(), strict=True)
    assert all(a.equal(b) for a, b in weights)
    seen |= {plain.fingerprint(), scaled.fingerprint()}
    assert len(seen) == 6
    name = plain.fingerprint()
    plain.hf.config.use_cache = not plain.hf.config.use_cache
    plain.hf.config.name_or_path = "elsewhere"
    assert plain.fingerprint() == name


def test_taking_one_makes_no_copy_of_the_weights():
    parameter = torch.nn.Parameter(torch.ones(1 << 24))  # 64 MiB
    for take in (lambda: fingerprint._sums([parameter]), lambda: digest(parameter)):
        take()
        with PeakMemory(torch.device("cpu")) as memory:
            take()
        assert memory.mib < 40
