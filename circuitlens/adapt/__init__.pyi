from .competence import finetune, is_competent
from .front import Front
from .merging import Merged, merge
from .result import TransferResult
from .strategies import STRATEGIES
from .transfers import transfer

__all__ = [
    "STRATEGIES",
    "Front",
    "Merged",
    "TransferResult",
    "finetune",
    "is_competent",
    "merge",
    "transfer",
]
