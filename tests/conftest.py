"""Shared fixtures, among them a trained toy model; what is no fixture is in helpers.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For processes that tests start; tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two threads that wait for each other on busy cores are slower than one.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data" / "nusax").is_dir():
        pytest.skip("the shared data and checkpoints are not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def toy_task():
    import circuitlens as cl

    return cl.load_task("toy")


@pytest.fixture(scope="session")
def toy_proxy(toy_task, tmp_path_factory, worker_id):
    """A small model that does the toy task well, though not perfectly."""
    import circuitlens as cl
    from circuitlens.tasks import toy

    def train() -> cl.HookedModel:
        options = {**toy.TOY_FINETUNE, "epochs": 12}
        return cl.finetune(toy.toy_model(n_layers=2), toy_task, **options)

    if worker_id == "master":
        return train()
    # Tests run side by side in several processes, of which one trains it.
    path = tmp_path_factory.getbasetemp().parent / "toy_proxy.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            trained = train()
            save_file({n: p.detach() for n, p in trained.hf.named_parameters()}, path)
            return trained
    model = toy.toy_model(n_layers=2)
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            parameter.copy_(weights[name])
    model.origin, model.prompt = "fine-tuned", toy_task.prompt
    return model


@pytest.fixture(scope="session")
def toy_baseline(toy_proxy, toy_task):
    import circuitlens as cl

    return cl.label_balanced_mean(toy_proxy, toy_task, examples=toy_task["pool_a"][:300])


@pytest.fixture(scope="session")
def toy_scores(toy_proxy, toy_task, toy_baseline):
    import circuitlens as cl

    return cl.relevance(toy_proxy, toy_task, toy_baseline, method="cdt-linear")
