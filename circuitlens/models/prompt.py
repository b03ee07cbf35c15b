"""What a model is asked and how it may answer: template, words, and how they become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from circuitlens.errors import InputError, check_choice, first_line
from circuitlens.models.batch import Readout, Words
from circuitlens.models.tokens import PromptText
from circuitlens.utils.storage import read_json, write_json

__all__ = ["READOUTS", "Prompt", "label_words", "template_fields"]

READOUTS = ("auto", "token", "sequence", "sequence-mean", "classifier")
_FILE, _SCHEMA = "prompt.json", "circuitlens.prompt/1"
# Nothing that a chat template would strip or escape.
_TEXT = "circuitlens-text"


def template_fields(template: str) -> list[str]:
    """Names of the fields in a prompt template, in order, as often as they occur.

    Raises:
        InputError: if the template cannot be parsed, or a field has no name.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(
            f"The prompt template {template!r} cannot be read ({error}); write {{{{ and }}}} for "
            "braces that are not a field."
        ) from error
    if not all(name.isidentifier() for name in names):
        raise InputError(
            f"The prompt template {template!r} has a field without a proper name: name the text "
            "in the braces, such as {text}."
        )
    return names


def label_words(labels: Any) -> dict[str, Words]:
    """Check the answer words by label, and turn labels into strings, as data files have them.

    Raises:
        InputError: if they are no mapping, a label is empty or is there twice, or a word is
            neither a string nor a list of some.
    """
    if not isinstance(labels, Mapping):
        raise InputError(
            "labels must be a mapping from every label to its answer word, such as "
            f"{{'negative': ' negative'}}, but is {labels!r}."
        )
    found: dict[str, Words] = {}
    for label, word in labels.items():
        name = "" if label is None else str(label)
        if not name.strip():
            raise InputError(f"The label {label!r} of the word {word!r} is empty: give it a name.")
        if name in found:
            raise InputError(f"The label {name!r} is in labels twice: remove one.")
        several = isinstance(word, list | tuple) and word
        if not (isinstance(word, str) or (several and all(isinstance(w, str) for w in word))):
            raise InputError(
                f"The answer word of the label {name!r} must be a string, such as "
                f"{f' {name}'!r}, or a list of some, but is {word!r}."
            )
        found[name] = word if isinstance(word, str) else tuple(word)
    return found


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and what its answers mean.

    With it another process asks a model the same: it is saved with results and adapters.

    Attributes:
        template: prompt template; its fields are names of texts. A model with a classification
            head is given the texts of these fields, in order, and no prompt.
        labels: answer word, or words, by label.
        max_text_tokens: texts are cut beyond this many tokens.
        readout: how answers are read: ``"token"``, ``"sequence"`` (whole words),
            ``"sequence-mean"`` (the mean over their tokens), ``"classifier"``, or ``"auto"`` for
            what suits the model and the words.
        bos: whether prompts begin with ``<s>``; ``None`` is as the tokenizer does it.
        chat: put the prompt into the tokenizer's chat template; the answer is what the assistant
            says first.
        system: system prompt of the chat.
        choices: names of texts that are the possible answers of an example, in place of words.
    """

    template: str
    labels: Mapping[str, Words]
    max_text_tokens: int = 96
    readout: str = "auto"
    bos: bool | None = None
    chat: bool = False
    system: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", label_words(self.labels))
        object.__setattr__(self, "choices", tuple(self.choices))
        check_choice("readout", self.readout, READOUTS)
        if self.bos not in (None, True, False):
            raise InputError(f"bos must be True, False or None, but is {self.bos!r}.")
        if self.system and not self.chat:
            raise InputError("A system prompt needs chat=True (--chat): set it, or leave both out.")
        if self.choices and len(self.choices) != len(self.labels):
            raise InputError(
                f"There are {len(self.choices)} choices ({', '.join(self.choices)}) and "
                f"{len(self.labels)} labels ({', '.join(self.labels)}): name a choice for each."
            )

    @property
    def fields(self) -> list[str]:
        """Names of the texts that every example needs: those of the template, and the choices."""
        return [*template_fields(self.template), *self.choices]

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        words = {k: w if isinstance(w, str) else list(w) for k, w in self.labels.items()}
        return {**asdict(self), "labels": words, "choices": list(self.choices)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Prompt:
        """Rebuild what :meth:`to_dict` returned."""
        given = dict(content)
        return cls(
            **{**given, "labels": label_words(given["labels"]), "choices": tuple(given["choices"])}
        )

    def save(self, folder: Path) -> None:
        """Write ``prompt.json``."""
        write_json(folder / _FILE, _SCHEMA, self.to_dict())

    @classmethod
    def found(cls, folder: Path) -> Prompt | None:
        """Read what :meth:`save` wrote into a folder, if it did."""
        if not (folder / _FILE).is_file():
            return None
        return cls.from_dict(read_json(folder / _FILE, _SCHEMA))

    # -- text ------------------------------------------------------------------------------------

    def outer(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """What the chat template puts before the prompt and behind it.

        Raises:
            InputError: if the tokenizer has no chat template, or its template takes no system
                prompt.
        """
        if not self.chat:
            return "", ""
        if not tokenizer.chat_template:
            raise InputError(
                "chat=True puts prompts into the tokenizer's chat template, and it has none: leave "
                "chat out, or load an instruction-tuned checkpoint."
            )
        roles = [("system", self.system)] if self.system else []
        turns = [{"role": r, "content": text} for r, text in (*roles, ("user", _TEXT))]
        try:
            # Where a model can think aloud, its answer would come after that.
            shown = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # what templates raise is up to them
            raise InputError(
                f"The chat template of the tokenizer rejects the prompt ({first_line(error)}): "
                "leave the system prompt out."
            ) from error
        before, found, behind = str(shown).partition(_TEXT)
        if not found:
            raise InputError("The chat template of the tokenizer does not show the user's message.")
        return before, behind

    def text(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, str],
        outer: tuple[str, str] = ("", ""),
        marks: frozenset[str] = frozenset(),
    ) -> PromptText:
        """Fill the template; ``outer`` is what :meth:`outer` gave.

        ``marks`` are fields filled with placeholders, in which special tokens are special.
        """
        parts: list[tuple[str, bool]] = [(outer[0], True)]
        for literal, name, spec, conversion in Formatter().parse(self.template):
            parts.append((literal, True))
            if name is not None:
                how = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                parts.append((f"{{{name}{how}}}".format(**texts), name in marks))
        parts.append((outer[1], True))
        return PromptText(tokenizer, tuple((text, mine) for text, mine in parts if text))

    def words(self) -> dict[str, Words]:
        """Answer words as they follow the prompt: what an assistant says begins without a space."""
        if not self.chat:
            return dict(self.labels)
        return {
            label: word.lstrip() if isinstance(word, str) else tuple(w.lstrip() for w in word)
            for label, word in self.labels.items()
        }

    def bare(self, tokenizer: PreTrainedTokenizerBase) -> PromptText:
        """An example of a prompt: ``x`` for every text."""
        texts = dict.fromkeys(template_fields(self.template), "x")
        return self.text(tokenizer, texts, self.outer(tokenizer))

    def readout_of(self, readout: Readout, tokenizer: PreTrainedTokenizerBase) -> Readout:
        """The readout of these labels in a model whose own is ``readout``.

        Raises:
            InputError: if labels cannot be told apart, or the model cannot answer like this.
        """
        if self.choices:
            if self.readout not in ("auto", "sequence", "sequence-mean"):
                raise InputError(
                    f"Answers that every example brings itself ({', '.join(self.choices)}) are "
                    f"read by readout='sequence' or 'sequence-mean', not {self.readout!r}."
                )
            mean = self.readout == "sequence-mean"
            return readout.for_choices(tokenizer, len(self.choices), mean=mean)
        return readout.for_labels(self.bare(tokenizer), self.words(), self.readout)
