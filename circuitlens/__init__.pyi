from . import tasks, view
from .adapt import Merged, TransferResult, finetune, merge, transfer
from .baseline import MeanBaseline, label_balanced_mean
from .cdt import RULES, RuleSet, decompose
from .circuit import Circuit
from .circuits import (
    FaithfulnessCurve,
    HeadEffects,
    HeadRoles,
    MarginByLayer,
    Minimality,
    PublishedCircuit,
    ScorerComparison,
    compare_scorers,
    faithfulness,
    head_effects,
    head_roles,
    margin_by_layer,
    minimality,
    published_circuit,
    smallest_circuit,
)
from .errors import (
    CircuitLensError,
    CompetenceError,
    InputError,
    NotFiniteError,
    UnsupportedModelError,
)
from .experiments import Comparison, compare
from .models.batch import Batch
from .models.geometry import HeadGeometry, WeightSlice
from .models.hooked import HookedModel
from .models.media import Audio
from .models.prompt import Prompt
from .node_circuit import NodeCircuit, NodeGrid
from .nodes import MLP, Head, HeadAt, Neuron
from .opening import load
from .planning import Plan, plan
from .predicting import predict
from .scoring import (
    METHODS,
    HeadScores,
    NodeScores,
    Stability,
    discover,
    neuron_relevance,
    relevance,
)
from .tasks import Evaluation, Example, Task, evaluate, load_task

__version__: str

__all__ = [
    "METHODS",
    "MLP",
    "RULES",
    "Audio",
    "Batch",
    "Circuit",
    "CircuitLensError",
    "Comparison",
    "CompetenceError",
    "Evaluation",
    "Example",
    "FaithfulnessCurve",
    "Head",
    "HeadAt",
    "HeadEffects",
    "HeadGeometry",
    "HeadRoles",
    "HeadScores",
    "HookedModel",
    "InputError",
    "MarginByLayer",
    "MeanBaseline",
    "Merged",
    "Minimality",
    "Neuron",
    "NodeCircuit",
    "NodeGrid",
    "NodeScores",
    "NotFiniteError",
    "Plan",
    "Prompt",
    "PublishedCircuit",
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
    "head_effects",
    "head_roles",
    "label_balanced_mean",
    "load",
    "load_task",
    "margin_by_layer",
    "merge",
    "minimality",
    "neuron_relevance",
    "plan",
    "predict",
    "published_circuit",
    "relevance",
    "smallest_circuit",
    "tasks",
    "transfer",
    "view",
]
