from . import tasks, view
from .adapt import TransferResult, finetune, transfer
from .baseline import MeanBaseline, label_balanced_mean
from .batch import Batch
from .cdt import RULES, RuleSet, decompose
from .circuit import Circuit
from .comparison import ScorerComparison, compare_scorers
from .curve import FaithfulnessCurve
from .discovery import discover
from .errors import (
    CircuitLensError,
    CompetenceError,
    InputError,
    NotFiniteError,
    UnsupportedModelError,
)
from .evaluation import Evaluation, evaluate
from .experiments import Comparison, compare
from .geometry import Head, HeadGeometry, WeightSlice
from .loading import load
from .marginal import Minimality, minimality
from .measuring import faithfulness
from .model import HookedModel
from .nodes import MLP
from .scorers import METHODS
from .scores import HeadScores, Stability
from .scoring import relevance
from .tasks import Example, Task, load_task

__version__: str

__all__ = [
    "METHODS",
    "MLP",
    "RULES",
    "Batch",
    "Circuit",
    "CircuitLensError",
    "Comparison",
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
    "Minimality",
    "NotFiniteError",
    "RuleSet",
    "ScorerComparison",
    "Stability",
    "Task",
    "TransferResult",
    "UnsupportedModelError",
    "WeightSlice",
    "compare",
    "compare_scorers",
    "decompose",
    "discover",
    "evaluate",
    "faithfulness",
    "finetune",
    "label_balanced_mean",
    "load",
    "load_task",
    "minimality",
    "relevance",
    "tasks",
    "transfer",
    "view",
]
