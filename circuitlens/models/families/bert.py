"""BERT and RoBERTa with the masked-language-model head."""

from __future__ import annotations

from circuitlens.models.families.family import ActivationSite, Family

__all__ = ["BertFamily", "RobertaFamily"]


class BertFamily(Family):
    """BERT: tokens see each other both ways, and the head has an activation of its own."""

    causal = False

    @property
    def lm_head_activations(self) -> tuple[ActivationSite, ...]:
        """The one before the head's norm."""
        return (ActivationSite("ln_final.hook_in", "mlm_head.hook_out"),)


class RobertaFamily(BertFamily):
    """RoBERTa and XLM-R: BERT with positions counted from behind that of the padding."""

    @property
    def architecture(self) -> str:
        """XLM-R is RoBERTa under another name, which TransformerLens does not know."""
        return type(self.hf).__name__.removeprefix("XLM")

    @property
    def first_position(self) -> int:
        """Position id of the first token."""
        return int(self.hf.config.pad_token_id) + 1
