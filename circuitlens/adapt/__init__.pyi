from .competence import finetune, is_competent
from .front import Front
from .merging import Merged, merge
from .result import TransferResult
from .selections import select_heads
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
    "select_heads",
    "transfer",
]
