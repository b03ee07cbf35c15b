"""Training: competence in the source language, transfer to a target language."""

from circuitlens.adapt.competence import finetune, is_competent
from circuitlens.adapt.result import TransferResult
from circuitlens.adapt.strategies import STRATEGIES
from circuitlens.adapt.transfers import transfer

__all__ = ["STRATEGIES", "TransferResult", "finetune", "is_competent", "transfer"]
