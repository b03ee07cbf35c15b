"""Circuits, measured: faithfulness, minimality, and the circuits that scorers find side by side."""

from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.effects import HeadEffects, head_effects
from circuitlens.circuits.lens import MarginByLayer, margin_by_layer
from circuitlens.circuits.looking import HeadRole, HeadRoles, head_roles
from circuitlens.circuits.measure_faithfulness import faithfulness
from circuitlens.circuits.measure_minimality import Minimality, minimality
from circuitlens.circuits.published import PublishedCircuit, published_circuit
from circuitlens.circuits.scorer_comparison import ScorerComparison, compare_scorers
from circuitlens.circuits.smallest import smallest_circuit

__all__ = [
    "FaithfulnessCurve",
    "HeadEffects",
    "HeadRole",
    "HeadRoles",
    "MarginByLayer",
    "Minimality",
    "PublishedCircuit",
    "ScorerComparison",
    "compare_scorers",
    "faithfulness",
    "head_effects",
    "head_roles",
    "margin_by_layer",
    "minimality",
    "published_circuit",
    "smallest_circuit",
]
