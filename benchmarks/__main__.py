"""Run every benchmark and print one JSON object a line."""

from __future__ import annotations

import json

from benchmarks import relevance

if __name__ == "__main__":
    for result in relevance.run():
        print(json.dumps(result), flush=True)
