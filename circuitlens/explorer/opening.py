"""The explorer of a circuit in a notebook: look at heads, edit the circuit, watch what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from circuitlens.baseline import MeanBaseline
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.errors import InputError
from circuitlens.explorer.probing import Probe
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Task

if TYPE_CHECKING:
    from circuitlens.explorer.widget import Explorer

__all__ = ["explore"]

Scores = HeadScores | Sequence[HeadScores] | Mapping[str, HeadScores]


def explore(
    model: HookedModel | None = None,
    task: Task | None = None,
    baseline: MeanBaseline | None = None,
    scores: Scores | None = None,
    circuit: Circuit | None = None,
    *,
    curve: FaithfulnessCurve | None = None,
    n_examples: int = 60,
    mode: str = "auto",
    seed: int = 0,
) -> Explorer:
    """Explore heads and circuits in a notebook (Jupyter, VS Code).

    Click a head, or go to it with the arrow keys: its attention pattern and what it adds to the
    logits on an example, its relevance, and what mean ablation of it does. Enter adds it to the
    circuit or removes it; the faithfulness of the circuit follows. ``explorer.circuit`` is the
    circuit as it stands.

    Without a model the saved results are shown and the circuit can be edited, but nothing is
    computed. With one, results are kept, so the weights may not change while it is explored.

    Args:
        model, task, baseline: all three, or none to look at saved results.
        scores: one or several, told apart by their method or by the names of a mapping; with a
            model they may be left out, for the explorer computes the cheap methods itself.
        circuit: to begin with; empty if left out.
        curve: its faithfulness is drawn alongside the circuit.
        n_examples: held-out examples, drawn at random in each language, that examples are chosen
            from and that ablation and faithfulness are measured on. More take longer.
        mode: ``"light"``, ``"dark"``, or ``"auto"`` for that of the notebook, and where it has
            none, of the browser.
        seed: of the sample and of bootstrap intervals.

    Raises:
        InputError: if parts are missing or do not belong together, or anywidget is not installed.
    """
    if mode not in ("auto", "light", "dark"):
        raise InputError(f"The mode is 'auto', 'light' or 'dark', but is {mode!r}.")
    named = _by_name(scores)
    parts = {"model": model, "task": task, "baseline": baseline}
    missing = [name for name, part in parts.items() if part is None]
    if 0 < len(missing) < len(parts):
        raise InputError(
            f"The explorer needs model, task and baseline together, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: give all three (cl.load, "
            "cl.load_task, cl.label_balanced_mean), or none to look at saved scores."
        )
    if missing and not named:
        raise InputError(
            "The explorer has nothing to show: give scores (cl.relevance, or HeadScores.load), or "
            "a model with its task and baseline."
        )
    probe = None
    if model is not None and task is not None and baseline is not None:
        seen = {i for found in named.values() for i in found.example_ids}
        probe = Probe(model, task, baseline, n_examples=n_examples, seed=seed, seen=seen)
        shape, whose = (model.geometry.n_layers, model.geometry.n_heads), f"{model.name} has"
    else:
        first = next(iter(named.values()))
        shape, whose = (first.n_layers, first.n_heads), "the scores are of"
    _check_sizes(shape, whose, named, circuit, curve)
    try:
        from circuitlens.explorer.widget import Explorer
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("anywidget", "traitlets", "ipywidgets"):
            raise
        raise InputError(
            "The explorer is a notebook widget and needs anywidget, which is not installed: "
            "pip install circuitlens[notebooks]."
        ) from error
    return Explorer(shape, named, circuit, probe, curve, mode)


def _by_name(scores: Scores | None) -> dict[str, HeadScores]:
    if scores is None:
        return {}
    if isinstance(scores, Mapping):
        return dict(scores)
    several = [scores] if isinstance(scores, HeadScores) else list(scores)
    named: dict[str, HeadScores] = {}
    for each in several:
        if each.method in named:
            raise InputError(
                f"Two of the scores are by {each.method!r}, so their names would be the same: "
                "pass a mapping of names to scores."
            )
        named[each.method] = each
    return named


def _check_sizes(
    shape: tuple[int, int],
    whose: str,
    scores: Mapping[str, HeadScores],
    circuit: Circuit | None,
    curve: FaithfulnessCurve | None,
) -> None:
    """Reject results of a model of another size than ``shape``."""
    right = f"{whose} {shape[0]} layers of {shape[1]} heads"
    grids = [(f"The scores {name!r} are", s.n_layers, s.n_heads) for name, s in scores.items()]
    if circuit is not None:
        grids.append(("The circuit is", circuit.n_layers, circuit.n_heads))
    for what, n_layers, n_heads in grids:
        if (n_layers, n_heads) != shape:
            raise InputError(
                f"{what} of a {n_layers} × {n_heads} model, but {right}: give results of one model."
            )
    if curve is not None and curve.n_heads != shape[0] * shape[1]:
        raise InputError(
            f"The curve is of a model with {curve.n_heads} heads, but {right}: give results of "
            "one model."
        )
