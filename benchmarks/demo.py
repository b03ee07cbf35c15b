"""How long the demo takes, on an idle machine and beside three busy processes.

python -m benchmarks.demo                              # run it on an idle machine
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Matrix products in one thread, as another training would do.
_BUSY = """
import torch
torch.set_num_threads(1)
x = torch.randn(400, 400)
while True:
    x = (x @ x).tanh()
"""


def seconds() -> float:
    """Of one demo, from the command to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        command = [sys.executable, "-m", "circuitlens", "demo", "--out", str(Path(scratch) / "run")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Run so many processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(n)]
    try:
        time.sleep(5)
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def main() -> None:
    """Print both times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--busy", type=int, default=3, help="processes beside it")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    idle = seconds()
    with busy(args.busy):
        beside = seconds()
    found = {
        "benchmark": "demo",
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "idle_s": round(idle, 1),
        "busy_processes": args.busy,
        "busy_s": round(beside, 1),
        "ratio": round(beside / idle, 2),
        "target_ratio": 3,
        "target_idle_s": 120,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
