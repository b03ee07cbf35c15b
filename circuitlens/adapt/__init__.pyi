from .competence import finetune, is_competent
from .result import TransferResult
from .strategies import STRATEGIES
from .transfers import transfer

__all__ = ["STRATEGIES", "TransferResult", "finetune", "is_competent", "transfer"]
