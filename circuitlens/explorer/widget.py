"""The explorer's widget: state in traits, questions of the browser and answers as messages.

The browser sends ``{"id", "kind", …}`` and gets ``{"id", "kind", "ok", …}``; what goes wrong comes
back as ``error``, to be shown. It asks one thing at a time, always what its present state lacks,
so that clicks made while Python computes change the state at once and only the newest is answered.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import plotly.graph_objects as go
import traitlets

from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.lens import margin_by_layer
from circuitlens.circuits.looking import head_roles
from circuitlens.errors import CircuitLensError, InputError, check_choice
from circuitlens.explorer.probing import CHEAP_METHODS, Probe
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.view.roles import head_card, margin_lens
from circuitlens.view.theme import look

__all__ = ["Explorer"]

logger = logging.getLogger(__name__)

_STATIC = Path(__file__).parent / "static"
# anywidget takes one ES module, and a module from a string cannot import others by their path.
_SCRIPTS = ("basics", "answers", "map", "circuit", "panel", "explorer")

Reply = tuple[dict[str, Any], list[bytes]]


class Explorer(anywidget.AnyWidget):
    """An explorer of heads and circuits; make one with :func:`circuitlens.view.explore`.

    Attributes:
        method, language, example, selected, members, mode: what is shown and chosen; they can be
            set from Python too. ``example`` is the number of an example in the sample.
        scores: by name, with those that the explorer computed itself.
    """

    _esm = "\n".join((_STATIC / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    _css = _STATIC / "explorer.css"

    facts = traitlets.Dict().tag(sync=True)
    grids = traitlets.Dict().tag(sync=True)
    method = traitlets.Unicode().tag(sync=True)
    language = traitlets.Unicode().tag(sync=True)
    example = traitlets.Int(0).tag(sync=True)
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    members = traitlets.List(traitlets.Unicode()).tag(sync=True)
    mode = traitlets.Enum(["auto", "light", "dark"], "auto").tag(sync=True)

    def __init__(
        self,
        shape: tuple[int, int],
        scores: Mapping[str, HeadScores],
        circuit: Circuit | None,
        probe: Probe | None,
        curve: FaithfulnessCurve | None,
        mode: str,
    ) -> None:
        self._shape, self._probe = shape, probe
        self._start = circuit
        self.scores = dict(scores)
        super().__init__(
            facts=_facts(shape, self.scores, probe, curve),
            grids={name: _grid(s) for name, s in self.scores.items()},
            method=next(iter(self.scores), CHEAP_METHODS[0]),
            language=probe.task.language if probe else "",
            members=[str(head) for head in circuit or ()],
            mode=mode,
        )
        self.on_msg(self._receive)

    @traitlets.validate("members", "selected")
    def _check_heads(self, proposal: Any) -> list[str]:
        heads = self._parse(proposal["value"])
        # A circuit is a set; of the selected heads the first one is the one in hand.
        ordered = sorted(set(heads)) if proposal["trait"].name == "members" else heads
        return [str(head) for head in ordered]

    @traitlets.validate("method", "language")
    def _check_choice(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, str(proposal["value"])
        methods, languages = [*self.scores, *self.facts["cheap"]], self.facts["languages"]
        # Saved results have scores of one language, which has no name here.
        check_choice(name, value, methods if name == "method" else languages or [""])
        return value

    def _parse(self, names: Iterable[str]) -> list[Head]:
        heads = [Head.parse(name) for name in names]
        Circuit(tuple(heads), *self._shape)  # refuses heads that the model has not
        return heads

    # -- the circuit -----------------------------------------------------------------------

    @property
    def circuit(self) -> Circuit:
        """The circuit as it stands; one that was edited says so in its ``selection``."""
        return self._circuit(self._parse(self.members))

    @circuit.setter
    def circuit(self, circuit: Circuit) -> None:
        if (circuit.n_layers, circuit.n_heads) != self._shape:
            raise InputError(
                f"The circuit is of a {circuit.n_layers} × {circuit.n_heads} model, but the "
                f"explorer shows {self._shape[0]} layers of {self._shape[1]} heads."
            )
        self._start = circuit
        self.members = [str(head) for head in circuit]

    def _circuit(self, heads: Sequence[Head]) -> Circuit:
        start = self._start
        if start is not None and set(start) == set(heads):
            return start
        shown = self.scores.get(self.method)
        how = "by hand in the explorer"
        if start is not None:
            edits = [f"+ {head}" for head in sorted(set(heads) - set(start))]
            edits += [f"- {head}" for head in sorted(set(start) - set(heads))]
            how += f", from ({start.selection}): {', '.join(edits)}"
        elif shown is not None:
            how += f", alongside the scores of {self.method}"
        origin = start.provenance if start is not None else None
        origin = origin or (shown.provenance if shown is not None else None)
        return Circuit(tuple(heads), *self._shape, how, origin)

    # -- figures ---------------------------------------------------------------------------

    def head_card(self, head: Head | str | None = None) -> go.Figure:
        """Draw where a head looks and which labels it raises (:func:`circuitlens.view.head_card`).

        Args:
            head: by default the one in hand, or the first of the circuit.

        Raises:
            InputError: if no head is chosen, or the explorer has no model.
        """
        probe = self._with_model()
        names = [str(head)] if head is not None else [*self.selected, *self.members]
        if not names:
            raise InputError("No head is chosen: click one, or give its name, head_card('a0.h3').")
        (chosen,) = self._parse(names[:1])
        roles = head_roles(
            probe.model,
            probe.task,
            [chosen],
            probe.baseline,
            max_examples=probe.max_score_examples,
            seed=probe.seed,
            quiet=True,
        )
        return head_card(roles, chosen, self.circuit)

    def margin_lens(self) -> go.Figure:
        """Draw in which layers the answer is made (:func:`circuitlens.view.margin_lens`).

        Raises:
            InputError: if the explorer has no model.
        """
        probe = self._with_model()
        return margin_lens(margin_by_layer(probe.model, probe.task, quiet=True))

    def _with_model(self) -> Probe:
        if self._probe is None:
            raise InputError(
                "This needs the model: make the explorer with explore(model, task, baseline, …)."
            )
        return self._probe

    # -- questions of the browser ----------------------------------------------------------

    def _receive(self, _: object, content: dict[str, Any], buffers: object) -> None:
        echo = {"id": content.get("id"), "kind": content.get("kind")}
        try:
            reply, data = self.answer(content)
        except BaseException as error:
            known = isinstance(error, CircuitLensError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            detail = "" if known else "".join(traceback.format_exception(error))
            self.send({**echo, "ok": False, "error": message, "detail": detail})
            if not isinstance(error, Exception):
                raise  # the user has interrupted the kernel
            if not known:
                logger.exception("The explorer could not answer %r.", content.get("kind"))
        else:
            self.send({**echo, "ok": True, **reply}, data)

    def answer(self, content: Mapping[str, Any]) -> Reply:
        """Answer a question of the browser: a message for JSON, and binary data with it.

        Raises:
            InputError: if it cannot be answered, or only with a model and there is none.
        """
        kind = content.get("kind")
        if kind == "save":
            return self._save(content), []
        probe = self._with_model()
        if kind == "scores":
            return self._score(str(content["method"]), probe), []
        language = str(content["language"])
        if kind == "sample":
            return _sample(probe, language), []
        if kind == "circuit":
            kept = probe.faithfulness(language, self._parse(content["members"]))
            return asdict(kept), []
        if kind not in ("look", "effect"):
            raise InputError(f"The explorer does not know the question {kind!r}.")
        (head,) = self._parse([content["head"]])
        if kind == "effect":
            return asdict(probe.effect(language, head)), []
        return _look(probe, language, int(content["example"]), head)

    def _score(self, method: str, probe: Probe) -> dict[str, Any]:
        if method not in self.scores:
            self.scores[method] = probe.scores(method)
            self.grids = {**self.grids, method: _grid(self.scores[method])}
        return {"method": method}

    def _save(self, content: Mapping[str, Any]) -> dict[str, Any]:
        name = str(content["path"]).strip()
        if not name:
            raise InputError("Give the name of the file to write, such as circuit.json.")
        path = Path(name).expanduser().resolve()
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a file in it.")
        # The name comes from a browser, which may be that of somebody else (a served notebook).
        if path.suffix != ".json" or not path.is_relative_to(Path.cwd().resolve()):
            raise InputError(
                f"The explorer writes .json files below {Path.cwd()} only, not {path}: give such a "
                "name, or use explorer.circuit.save(…)."
            )
        if path.exists() and not content.get("overwrite"):
            return {"exists": str(path)}
        circuit = self._circuit(self._parse(content["members"]))
        circuit.save(path)
        return {"saved": str(path), "heads": len(circuit)}


def _facts(
    shape: tuple[int, int],
    scores: Mapping[str, HeadScores],
    probe: Probe | None,
    curve: FaithfulnessCurve | None,
) -> dict[str, Any]:
    """What never changes while the explorer is open."""
    looks = {name: asdict(look(name)) for name in ("light", "dark")}
    facts: dict[str, Any] = {
        "n_layers": shape[0],
        "n_heads": shape[1],
        "computes": probe is not None,
        "looks": looks,
        "cheap": list(CHEAP_METHODS) if probe else [],
        "languages": list(probe.languages) if probe else [],
        "model": probe.model.name if probe else "",
        "task": probe.task.name if probe else "",
        "notes": [],
        "curve": None,
    }
    if probe is None:
        first = next(iter(scores.values())).provenance
        facts |= {"model": first.model, "task": first.task}
    else:
        weights = probe.baseline.provenance.model_fingerprint
        facts["notes"] = [
            f"The scores {name!r} were taken from other weights than the model's."
            for name, s in scores.items()
            if s.provenance.model_fingerprint != weights
        ]
    if curve is not None and curve.caveat:
        facts["notes"] = [*facts["notes"], curve.caveat]
    if curve is not None and not np.isnan(curve.faithfulness).all():
        low, high = curve.interval()
        facts["curve"] = {
            "method": curve.method,
            "n": len(curve.example_ids),
            "sizes": list(curve.sizes),
            "f": curve.faithfulness.tolist(),
            # Empty where the interval has no bounds: JSON has no NaN.
            "low": [] if np.isnan(low).any() else low.tolist(),
            "high": [] if np.isnan(high).any() else high.tolist(),
            "accuracy": curve.accuracy.tolist(),
            "random": np.mean(curve.random_faithfulness, axis=0).tolist()
            if len(curve.random_margin)
            else [],
        }
    return facts


def _grid(scores: HeadScores) -> dict[str, Any]:
    low, high = scores.bounds()
    rank = [[0] * scores.n_heads for _ in range(scores.n_layers)]
    for place, head in enumerate(scores.ranking(), start=1):
        rank[head.layer][head.index] = place
    return {
        "method": scores.method,
        "task": scores.provenance.task,
        "n": len(scores.example_ids),
        "mean": scores.mean.tolist(),
        # JSON has no NaN.
        "low": None if scores.whole else low.tolist(),
        "high": None if scores.whole else high.tolist(),
        "unit": scores.unit,
        "rank": rank,
    }


def _sample(probe: Probe, language: str) -> dict[str, Any]:
    sample = probe.sample(language)
    labels = list(probe.task.labels)
    predicted = sample.clean.argmax(-1).tolist()
    return {
        "n": len(sample.examples),
        "n_held_out": sample.n_held_out,
        "examples": [
            {"id": e.id, "text": e.text, "gold": e.label, "predicted": labels[p]}
            for e, p in zip(sample.examples, predicted, strict=True)
        ],
    }


def _look(probe: Probe, language: str, example: int, head: Head) -> Reply:
    pattern = probe.attention(language, example, head).contiguous()
    content = {
        "tokens": probe.tokens(language, example),
        "decision": probe.decision(language, example),
        **asdict(probe.attribution(language, example, head)),
    }
    return content, [pattern.numpy().tobytes()]
