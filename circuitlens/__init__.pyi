from . import tasks, view
from .adapt import TransferResult, finetune, transfer
from .baseline import MeanBaseline, label_balanced_mean
from .batch import Batch
from .cdt import RULES, RuleSet, decompose
from .circuit import Circuit
from .curve import FaithfulnessCurve, faithfulness
from .errors import (
    CircuitLensError,
    CompetenceError,
    InputError,
    UnsupportedModelError,
)
from .evaluation import Evaluation, evaluate
from .geometry import Head, HeadGeometry, WeightSlice
from .model import HookedModel, load
from .scores import METHODS, HeadScores, relevance
from .tasks import Example, Task, load_task

__version__: str

__all__ = [
    "METHODS",
    "RULES",
    "Batch",
    "Circuit",
    "CircuitLensError",
    "CompetenceError",
    "Evaluation",
    "Example",
    "FaithfulnessCurve",
    "Head",
    "HeadGeometry",
    "HeadScores",
    "HookedModel",
    "InputError",
    "MeanBaseline",
    "RuleSet",
    "Task",
    "TransferResult",
    "UnsupportedModelError",
    "WeightSlice",
    "decompose",
    "evaluate",
    "faithfulness",
    "finetune",
    "label_balanced_mean",
    "load",
    "load_task",
    "relevance",
    "tasks",
    "transfer",
    "view",
]
