from .competence import finetune, is_competent
from .merging import Merged, merge
from .result import TransferResult
from .strategies import STRATEGIES
from .transfers import transfer

__all__ = [
    "STRATEGIES",
    "Merged",
    "TransferResult",
    "finetune",
    "is_competent",
    "merge",
    "transfer",
]
