"""TransferResult: what a transfer gained, what it cost, and the trained tensors."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from circuitlens.adapt.auto import Decision
from circuitlens.adapt.card import model_card
from circuitlens.adapt.front import Front
from circuitlens.adapt.monitors import PREFIX
from circuitlens.adapt.restoring import restore
from circuitlens.adapt.retention import CircuitShift, Retained
from circuitlens.adapt.strategies import place_of
from circuitlens.adapt.tensor_files import NOTE, NOTE_SCHEMA, TENSOR_FILES, Trained
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError, first_line
from circuitlens.models.hooked import HookedModel
from circuitlens.models.prompt import Prompt
from circuitlens.tasks.evaluation import Evaluation
from circuitlens.utils.provenance import Provenance, without_folder
from circuitlens.utils.storage import read_json, replacing, whole, write_json

if TYPE_CHECKING:
    from circuitlens.adapt.lora_export import LoraExport

__all__ = ["TransferResult", "saved_transfers"]

_SCHEMA = "circuitlens.transfer/2"


@dataclass(frozen=True)
class TransferResult:
    """What a transfer gained and what it cost.

    Attributes:
        strategy: which weights were trained.
        heads: the heads among them, if it was about heads.
        target_language, source_language: where it was measured; ``None`` without source task.
        target_before, target_after: on the target's test split.
        retained: the source task, if there is one, and others on request, before and after.
        n_trainable: trained entries.
        learning_rate: the rate chosen on the target's validation split; 0 where none did better
            than no training, and the model was kept as it was.
        alpha: share of the way from the weights before to the trained ones at which the model
            is; below 1 only if ``keep_source`` chose it.
        front: target and source on validation for every rate, amount of replay and α; ``None``
            without a source or other task to keep, and in results from before 0.2.
        test_front: start and front of it on the test splits, if that was asked for; nothing was
            chosen by them.
        monitored: value of every monitor before and at the point that was chosen (validation, or
            what the function returned).
        passes: prompts that went forward and backward through the model while it chose what to
            train, trained and was measured on the way (with ``test_front``, on test too), in all
            processes (a way back counts as two forward); 0 in results from before 0.2.
        validation: best validation accuracy for every rate tried, and at rate 0 before training.
        history: validation after each epoch, at the best rate.
        seconds: training time, all rates together, and that of ``auto``'s decision.
        target_right: which examples of the target's test split are answered correctly afterwards.
        target_ids: their ids; empty in results from before 0.2.
        drift: norm of the change of every head's weights, ``layer head``.
        shift: how the source circuit moved, if discovery was run again.
        decision: what ``strategy="auto"`` chose, and why.
        prompt: what the model was trained to answer; ``None`` in results from before 0.2.
        provenance: of the model before the transfer.
        model: the adapted model, as validation saw it; ``None`` if only the numbers were loaded.
        folder: where the trained tensors are, on disk.
        trained: what they are; told by the folder if not given.
    """

    strategy: str
    heads: Circuit | None
    target_language: str
    source_language: str | None
    target_before: Evaluation
    target_after: Evaluation
    retained: tuple[Retained, ...]
    n_trainable: int
    learning_rate: float
    validation: dict[float, float]
    history: tuple[dict[str, float], ...]
    seconds: float
    target_right: tuple[bool, ...] = field(repr=False)
    drift: tuple[tuple[float, ...], ...] = field(repr=False)
    shift: CircuitShift | None
    decision: Decision | None
    provenance: Provenance
    target_ids: tuple[str, ...] = field(default=(), repr=False)
    prompt: Prompt | None = field(default=None, repr=False)
    alpha: float = 1.0
    front: Front | None = field(default=None, repr=False)
    test_front: Front | None = field(default=None, repr=False)
    passes: float = 0.0
    monitored: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    model: HookedModel | None = field(default=None, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)
    trained: Trained | None = field(default=None, repr=False)
    # Keeps a temporary folder as long as the result.
    _scratch: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.trained is None and self.folder is not None:
            # Now, as another result may be saved into that folder later.
            object.__setattr__(self, "trained", Trained.found(self.folder))

    @property
    def source_before(self) -> Evaluation | None:
        """On the source's test split, before."""
        return self.retained[0].before if self.source_language else None

    @property
    def source_after(self) -> Evaluation | None:
        """On the source's test split, after (retention)."""
        return self.retained[0].after if self.source_language else None

    @property
    def target_gain(self) -> float:
        """Target accuracy after minus before."""
        return self.target_after.accuracy - self.target_before.accuracy

    @property
    def source_change(self) -> float | None:
        """Source accuracy after minus before; negative means forgotten."""
        if self.source_before is None or self.source_after is None:
            return None
        return self.source_after.accuracy - self.source_before.accuracy

    @property
    def text_loss_change(self) -> float | None:
        """Next-token loss on source text, after minus before, in nats per token."""
        losses = self.retained[0].text_loss if self.source_language else None
        return None if losses is None else losses[1] - losses[0]

    @property
    def is_adapter(self) -> bool:
        """Whether the trained tensors are a PEFT adapter, and not entries of the weights."""
        return self.trained is not None and self.trained.is_adapter

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON (without the model)."""
        return {
            "strategy": self.strategy,
            # A circuit without heads is false.
            "heads": None if self.heads is None else self.heads.to_dict(),
            "target_language": self.target_language,
            "source_language": self.source_language,
            "target_before": self.target_before.to_dict(),
            "target_after": self.target_after.to_dict(),
            "retained": [retained.to_dict() for retained in self.retained],
            "n_trainable": self.n_trainable,
            "learning_rate": self.learning_rate,
            "alpha": self.alpha,
            "front": self.front.to_dict() if self.front else None,
            "test_front": self.test_front.to_dict() if self.test_front else None,
            "passes": self.passes,
            "monitored": {name: list(pair) for name, pair in self.monitored.items()},
            "validation": [[rate, accuracy] for rate, accuracy in self.validation.items()],
            "history": list(self.history),
            "seconds": self.seconds,
            "target_right": [int(right) for right in self.target_right],
            "target_ids": list(self.target_ids),
            "drift": [list(row) for row in self.drift],
            "shift": self.shift.to_dict() if self.shift else None,
            "decision": self.decision.to_dict() if self.decision else None,
            "prompt": self.prompt.to_dict() if self.prompt else None,
            "provenance": self.provenance.to_dict(),
            "trained": self.trained.to_dict() if self.trained else None,
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row with the main numbers."""
        before, after = self.source_before, self.source_after
        row = {
            "strategy": self.strategy,
            "target": self.target_language,
            "target_accuracy_before": self.target_before.accuracy,
            "target_accuracy": self.target_after.accuracy,
            "target_macro_f1_before": self.target_before.macro_f1,
            "target_macro_f1": self.target_after.macro_f1,
            "source_accuracy_before": before.accuracy if before else None,
            "source_accuracy": after.accuracy if after else None,
            "text_loss_change": self.text_loss_change,
            "n_trainable": self.n_trainable,
            "learning_rate": self.learning_rate,
            "alpha": self.alpha,
            "seconds": self.seconds,
            "passes": self.passes,
        }
        for name, (before_value, value) in self.monitored.items():
            row |= {f"{PREFIX}{name}, before": before_value, f"{PREFIX}{name}": value}
        return pd.DataFrame([row])

    def save(self, folder: str | Path) -> None:
        """Write the numbers, the trained tensors, what these are, and a model card.

        An adapter is written as PEFT does it, so that ``PeftModel.from_pretrained`` reads it. The
        tensors of a result that was saved there before are removed.

        Raises:
            InputError: if the result was loaded without its model, or its tensors are gone from
                the folder that it was loaded from.
        """
        if self.model is None or self.folder is None or self.trained is None:
            raise InputError(
                "This result was loaded without its model, so it has no weights to save: "
                "give TransferResult.load the model that the transfer began from."
            )
        names = self.trained.files(self.folder)
        card = str(model_card(self))
        folder = Path(folder)
        # Removed first and written last, so that a folder with a result is a whole one.
        (folder / "result.json").unlink(missing_ok=True)
        for name in set(TENSOR_FILES) - set(names):
            (folder / name).unlink(missing_ok=True)
        for name in names:
            with replacing(folder / name) as temporary:
                shutil.copyfile(self.folder / name, temporary)
        self.trained.write(folder)
        with replacing(folder / "README.md") as temporary:
            temporary.write_text(card, encoding="utf-8")
        write_json(folder / "result.json", _SCHEMA, self.to_dict(), sealed=True)

    def save_as_lora(
        self, folder: str | Path, model: HookedModel, *, beside: bool = True
    ) -> LoraExport:
        """Write an adapter on slices of heads as plain LoRA, without approximation.

        The rank is the number of rows or columns, k · d_head for k heads of a layer.

        Args:
            folder: created.
            model: the model that the transfer began from.
            beside: let PEFT save trained norms and biases alongside the factors
                (``modules_to_save``, ``lora_bias``), so that the adapter is all of the transfer;
                PEFT then refuses to merge it where a projection has no bias. Serving engines read
                only the factors: without ``beside`` norms and biases are left out.

        Returns:
            Ranks, what is saved alongside the factors, and what was left out.

        Raises:
            InputError: for another model, or trained tensors that are not slices of heads.
        """
        from circuitlens.adapt.lora_export import write_lora

        if self.folder is None or self.trained is None:
            raise InputError("This result has no trained tensors: load it from its folder.")
        if model.fingerprint() != self.provenance.model_fingerprint:
            raise InputError(
                f"The transfer began from other weights than those of {model.name}: give the model "
                "that it began from."
            )
        trainable = restore(model, self.folder, self.trained)
        trainable.model.prompt = self.prompt
        return write_lora(trainable, model, Path(folder), beside=beside)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload what :meth:`save` writes to the Hugging Face hub.

        Args:
            repo_id: ``user/name``; made if it does not exist.
            private: of a new repository.
            token: of the hub; by default the one that is logged in.

        Returns:
            The address of the upload.

        Raises:
            InputError: if the hub cannot be reached or rejects the upload.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            self.save(scratch)
            _forget_paths(Path(scratch))
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=scratch,
                    commit_message=f"{self.strategy}: {self.target_language}",
                )
            except (HfHubHTTPError, OSError) as error:
                raise InputError(
                    f"The upload to {repo_id} failed ({first_line(error)}): check the name, the "
                    "token and the network, or save() the result and upload the folder yourself."
                ) from error
        return str(done)

    @classmethod
    def load(cls, folder: str | Path, model: HookedModel | None = None) -> TransferResult:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder.
            model: the model that the transfer began from, which is copied to adapt it; without
                it only the numbers are loaded.

        Raises:
            InputError: if ``model`` has other weights than that one, or the trained tensors are
                not in the folder.
        """
        folder = Path(folder)
        content = read_json(folder / "result.json", _SCHEMA)
        with whole(folder / "result.json"):
            provenance = Provenance.from_dict(content["provenance"])
            # Results saved before this was recorded have none.
            recorded = content.get("trained")
            trained = Trained.from_dict(recorded) if recorded else Trained.found(folder)
            asked = content.get("prompt")
            prompt = Prompt.from_dict(asked) if asked else None
        adapted = None
        if model is not None:
            if model.fingerprint() != provenance.model_fingerprint:
                raise InputError(
                    f"{folder} was trained from other weights than those of {model.name}: load "
                    "it with the model that the transfer began from."
                )
            adapted = restore(model, folder, trained).adapted()
            adapted.prompt = prompt
        with whole(folder / "result.json"):
            return cls(
                strategy=content["strategy"],
                heads=None if content["heads"] is None else Circuit.from_dict(content["heads"]),
                target_language=content["target_language"],
                source_language=content["source_language"],
                target_before=Evaluation(**content["target_before"]),
                target_after=Evaluation(**content["target_after"]),
                retained=tuple(map(Retained.from_dict, content["retained"])),
                n_trainable=content["n_trainable"],
                learning_rate=content["learning_rate"],
                alpha=content.get("alpha", 1.0),
                front=Front.from_dict(content["front"]) if content.get("front") else None,
                test_front=Front.from_dict(on_test)
                if (on_test := content.get("test_front"))
                else None,
                passes=content.get("passes", 0.0),
                monitored={n: (a, b) for n, (a, b) in content.get("monitored", {}).items()},
                validation={rate: accuracy for rate, accuracy in content["validation"]},  # noqa: C416
                history=tuple(content["history"]),
                seconds=content["seconds"],
                target_right=tuple(map(bool, content["target_right"])),
                drift=tuple(map(tuple, content["drift"])),
                shift=CircuitShift.from_dict(content["shift"]) if content["shift"] else None,
                decision=Decision.from_dict(content["decision"]) if content["decision"] else None,
                target_ids=tuple(content.get("target_ids", ())),
                prompt=prompt,
                provenance=provenance,
                model=adapted,
                folder=folder,
                trained=trained,
            )

    def _repr_html_(self) -> str:
        table = self.to_frame().T.to_html(header=False)
        why = f" ({html.escape(self.decision.why)})" if self.decision else ""
        return f"<p><b>TransferResult</b> {html.escape(self.strategy)}{why}</p>{table}"


def _forget_paths(folder: Path) -> None:
    """Take the places of this machine's files out of a saved result that is to be published."""
    for name, schema in (("result.json", _SCHEMA), (NOTE, NOTE_SCHEMA)):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path, schema)
        for part in (content, content.get("provenance") or {}, content.get("trained") or {}):
            for key in ("model", "checkpoint"):
                if isinstance(part.get(key), str):
                    part[key] = without_folder(part[key])
        write_json(path, schema, content, sealed=True)


def saved_transfers(folder: Path, languages: Sequence[str]) -> list[TransferResult]:
    """Numbers of all transfers in ``folder/LANGUAGE/STRATEGY``.

    Args:
        folder: the folder.
        languages: those that come first, in this order.
    """
    results = [TransferResult.load(path.parent) for path in folder.glob("*/*/result.json")]

    def place(result: TransferResult) -> tuple[int, str, tuple[int, str]]:
        language = result.target_language
        first = languages.index(language) if language in languages else len(languages)
        return first, language, place_of(result.strategy)

    return sorted(results, key=place)
