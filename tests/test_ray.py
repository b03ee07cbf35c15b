"""Grids on a Ray cluster of two nodes: the same table, and nodes, drivers and heads that die."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest
import torch

import circuitlens as cl
from circuitlens.errors import CircuitLensError
from circuitlens.experiments import RayCluster, cells, on_ray
from circuitlens.experiments.cell_folder import CellFolder, Key
from circuitlens.tasks import toy

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'circuitlens[ray]'")

GRID = {
    "strategies": ["circuit", "norms"],
    "seeds": [0, 1, 2],
    "epochs": 1,
    "learning_rates": [1e-3],
    "quiet": True,
    "simple": False,
}


def numbers(comparison):
    """All that a cell says but how long it took."""
    took = ("seconds", "peak_mib", "machine")
    found = [{k: v for k, v in cell.items() if k not in took} for cell in comparison.cells]
    for cell in found:
        cell["provenance"] = {k: v for k, v in cell["provenance"].items() if k not in took}
    return found


@pytest.fixture(scope="module")
def parts():
    model = toy.toy_model(n_layers=1)
    return model, cl.Circuit.of(["a0.h1"], 1, model.geometry.n_heads), cl.load_task("toy")


@pytest.fixture(scope="module")
def alone(parts):
    torch.set_num_threads(1)
    return cl.compare(*parts, ["near"], **GRID)


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    # Tests run beside each other, and Ray lets everybody else go first.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    if ray.is_initialized():
        ray.shutdown()
    found.shutdown()


@pytest.mark.slow
def test_two_nodes_make_the_table_of_one_process_though_one_is_killed(
    parts, alone, cluster, tmp_path, caplog
):
    (second,) = [node for node in cluster.list_all_nodes() if not node.head]

    def kill():
        while not list((tmp_path / "grid").rglob("seed-*.json")):
            time.sleep(0.2)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    caplog.set_level("INFO", logger="circuitlens")
    found = cl.compare(
        *parts, ["near"], **GRID, out=tmp_path / "grid", executor=RayCluster(cluster.address)
    )
    killer.join(10)
    assert not killer.is_alive()
    assert not found.errors
    assert numbers(found) == numbers(alone)
    assert "6 cells on 2 nodes of Ray" in caplog.text
    # Nothing is run twice by a second call, which needs no cluster.
    again = cl.compare(*parts, ["near"], **GRID, out=tmp_path / "grid", executor="ray")
    assert numbers(again) == numbers(alone)


# So many that some are left when the driver is killed, however fast the machine is.
MANY = {**GRID, "seeds": list(range(12))}
DRIVER = f"""
import signal
import sys
import torch
# Shells have what they start in the background ignore interrupts, and so has its offspring.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
import circuitlens as cl
from circuitlens.experiments import RayCluster
from circuitlens.tasks import toy
model = toy.toy_model(n_layers=1)
circuit = cl.Circuit.of(["a0.h1"], 1, model.geometry.n_heads)
cl.compare(
    model, circuit, cl.load_task("toy"), ["near"], out=sys.argv[1],
    executor=RayCluster(sys.argv[2]), **{MANY!r},
)
"""


def driver(out, address) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(out), address]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def first_cell(out) -> None:
    until = time.time() + 120
    while not list(out.rglob("seed-*.json")):
        assert time.time() < until
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_or_interrupted_resumes(parts, alone, cluster, tmp_path, how):
    out = tmp_path / "grid"
    process = driver(out, cluster.address)
    first_cell(out)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert how == signal.SIGKILL or "KeyboardInterrupt" in said
    done = len(list(out.rglob("seed-*.json")))
    assert 1 <= done < 2 * len(MANY["seeds"])
    found = cl.compare(*parts, ["near"], **GRID, out=out, executor=RayCluster(cluster.address))
    assert numbers(found) == numbers(alone)


@pytest.mark.slow
def test_a_head_that_goes_away_is_said(cluster, tmp_path):
    out = tmp_path / "grid"
    process = driver(out, cluster.address)
    first_cell(out)
    cluster.head_node.kill_gcs_server()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "no longer answers: finished cells are kept" in said
    assert list(out.rglob("seed-*.json"))


@pytest.mark.slow
def test_a_run_sends_its_transfers_to_ray(tmp_path):
    toy.toy_model(n_layers=1).save(tmp_path / "model")
    options = (
        f"run --model {tmp_path / 'model'} --task toy --target near --target far "
        "--strategy circuit --strategy head --size 3 --n-random 2 --epochs 1 --finetune-epochs 2 "
        "--rate 1e-3"
    )
    records = []
    for name, more in (("here", ""), ("ray", "--executor ray")):
        command = [sys.executable, "-m", "circuitlens", *options.split(), *more.split()]
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, capture_output=True)
        records.append(json.loads((tmp_path / name / "run.json").read_text()))
    for one, other in zip(*(record["transfers"] for record in records), strict=True):
        assert one["target_after"] == other["target_after"]
        assert other["provenance"]["model"] == str(tmp_path / "ray" / "proxy")
    model = cl.load(tmp_path / "ray" / "proxy")
    for folder in sorted((tmp_path / "ray" / "transfers").glob("*/*")):
        here = tmp_path / "here" / folder.relative_to(tmp_path / "ray")
        both = [cl.TransferResult.load(f, model).model.fingerprint() for f in (folder, here)]
        assert both[0] == both[1]


# -- without a cluster ------------------------------------------------------------------------


def test_the_files_of_a_model_are_written_once_on_a_machine(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray.tempfile, "gettempdir", lambda: str(tmp_path))
    reference = cells.ModelReference.save(parts[0], tmp_path / "driver")
    files = on_ray._packed(tmp_path / "driver")
    assert on_ray._unpacked(reference, files) == reference
    away = replace(reference, folder="/nowhere")
    found = on_ray._unpacked(away, files)
    assert found.open().fingerprint() == parts[0].fingerprint()
    assert on_ray._unpacked(away, {}) == found  # they are there
    # What a killed worker left is written again.
    (next(tmp_path.glob("circuitlens-*/.whole"))).unlink()
    assert on_ray._unpacked(away, files).open().fingerprint() == parts[0].fingerprint()


def test_nodes_that_come_and_go_are_said(caplog):
    caplog.set_level("INFO", logger="circuitlens")
    names = ["a", "b"]

    class Ray:
        @staticmethod
        def nodes():
            return [
                {"NodeID": n, "NodeManagerAddress": f"10.0.0.{n}", "Alive": n in names}
                for n in "abc"
            ]

    nodes = on_ray._Nodes(Ray)
    nodes.look()
    assert not caplog.text
    names.remove("b")
    nodes.look()
    nodes.look()
    said = "Node 10.0.0.b left the Ray cluster: its cells are run again on the 1 that are there."
    assert caplog.text.count(said) == 1
    names.append("c")
    nodes.look()
    assert "Node 10.0.0.c joined the Ray cluster." in caplog.text


def test_a_head_is_given_some_time():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        head = on_ray._Head(address)
        assert head.answers()
    for _ in range(2):
        assert not head.answers()
    with pytest.raises(CircuitLensError, match=f"head node of the Ray cluster \\({address}\\) no"):
        head.answers()
    assert head.gone


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_address_without_a_cluster_is_named(parts, address):
    with pytest.raises(cl.InputError, match=f"No Ray cluster answers at '{address}'"):
        cl.compare(*parts, ["near"], **GRID, executor=RayCluster(address))


def test_options_that_no_cluster_could_work_with_are_refused():
    for options in ({"num_cpus": 0}, {"retries": -1}, {"num_gpus": -1.0}):
        with pytest.raises(cl.InputError, match="num_cpus of at least 1"):
            RayCluster(**options)


def test_what_no_node_has_is_refused(parts):
    class Ray:
        @staticmethod
        def nodes():
            return [
                {"Alive": True, "Resources": {"CPU": 2.0, "memory": 1e9}},
                {"Alive": False, "Resources": {"CPU": 9.0, "GPU": 4.0}},
            ]

    reference = cells.ModelReference("/nowhere", "", "", "memory", "float32", "cpu")
    RayCluster(num_cpus=2, memory=10**9)._check(Ray, reference)
    with pytest.raises(cl.InputError, match="No node of the Ray cluster has 3 CPU, which"):
        RayCluster(num_cpus=3)._check(Ray, reference)
    with pytest.raises(cl.InputError, match=r"has 1 CPU, 0\.5 GPU, which"):
        RayCluster(num_gpus=0.5)._check(Ray, reference)


def test_without_ray_the_remedy_is_named(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(cl.InputError, match=r"pip install 'circuitlens\[ray\]'"):
        cl.compare(*parts, ["near"], **GRID, executor="ray")


def test_a_worker_that_died_too_often_is_an_error_of_its_cell(parts, tmp_path):
    cluster = RayCluster(retries=2)
    error = cluster._died(Key("near", "norms", 0), RuntimeError("killed\nmore"))
    assert "The worker of near, norms, seed 0 died, and 2 more after it" in str(error)
    assert "(RuntimeError: killed)" in str(error)
    assert CellFolder(tmp_path).read(Key("near", "norms", 0)) is None


@pytest.mark.slow
def test_processes_of_this_machine_make_the_same_table(parts, alone):
    found = cl.compare(*parts, ["near"], **GRID, executor="processes")
    assert not found.errors
    assert numbers(found) == numbers(alone)
