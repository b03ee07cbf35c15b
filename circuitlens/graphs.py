"""Circuits as the graphs of EAP-IG and MIB: JSON with nodes, edges and which of them are in.

Those graphs go by edges between heads (their queries, keys and values apart), MLPs, the input and
the logits. A circuit of heads keeps all MLPs, the input and the logits, and all edges between what
is in (Hanna et al. 2024, arXiv 2403.17806; Mueller et al. 2025, arXiv 2504.13151).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from circuitlens.errors import InputError
from circuitlens.nodes import Head
from circuitlens.utils.storage import replacing

__all__ = ["heads_of_graph", "write_graph"]


def write_graph(
    path: Path,
    heads: Collection[Head],
    *,
    n_layers: int,
    n_heads: int,
    d_model: int,
    parallel: bool,
    scores: Mapping[Head, float] | None,
) -> None:
    """Write the graph in which the heads, and all that is not a head, are in.

    Args:
        path: of the file.
        heads: of the circuit.
        n_layers, n_heads, d_model: of the model.
        parallel: whether heads and MLP of a layer read the same.
        scores: of all heads, for the nodes.
    """
    kept = set(map(str, heads))

    def inside(name: str) -> bool:
        return not name.startswith("a") or name in kept

    nodes: dict[str, dict[str, Any]] = {}
    for name in _nodes(n_layers, n_heads):
        nodes[name] = {"in_graph": inside(name)}
        if scores is not None and name.startswith("a"):
            nodes[name]["score"] = scores[Head.parse(name)]
    edges = {
        f"{source}->{target}{letter}": {
            "score": 0.0,
            "in_graph": inside(source) and inside(target),
        }
        for source, target, letter in _edges(n_layers, n_heads, parallel)
    }
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model}
    content = {"cfg": {**sizes, "parallel_attn_mlp": parallel}, "nodes": nodes, "edges": edges}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _nodes(n_layers: int, n_heads: int) -> Iterator[str]:
    yield "input"
    for layer in range(n_layers):
        yield from (f"a{layer}.h{head}" for head in range(n_heads))
        yield f"m{layer}"
    yield "logits"


def _edges(n_layers: int, n_heads: int, parallel: bool) -> Iterator[tuple[str, str, str]]:
    """Source, target and, where that is a head, which of its inputs."""
    stream = ["input"]
    for layer in range(n_layers):
        heads, mlp = [f"a{layer}.h{head}" for head in range(n_heads)], f"m{layer}"
        for source in stream:
            yield from ((source, head, f"<{letter}>") for head in heads for letter in "qkv")
        yield from ((source, mlp, "") for source in ([*stream] if parallel else [*stream, *heads]))
        stream += [*heads, mlp]
    yield from ((source, "logits", "") for source in stream)


def heads_of_graph(path: Path) -> tuple[list[Head], int, int]:
    """Read the heads that are in a graph, and the numbers of layers and heads per layer.

    Raises:
        InputError: if the file is not such a graph.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cfg, nodes = content["cfg"], content["nodes"]
        heads = [
            Head.parse(name)
            # Older files have a truth value in place of the entry.
            for name, node in nodes.items()
            if name.startswith("a") and (node if isinstance(node, bool) else node["in_graph"])
        ]
        return heads, int(cfg["n_layers"]), int(cfg["n_heads"])
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a graph of EAP-IG or MIB, which is JSON with cfg, nodes and edges."
        ) from error
