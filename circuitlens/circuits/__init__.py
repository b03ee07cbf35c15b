"""Circuits, measured: faithfulness, minimality, and the circuits that scorers find side by side."""

from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.measure_faithfulness import faithfulness
from circuitlens.circuits.measure_minimality import Minimality, minimality
from circuitlens.circuits.scorer_comparison import ScorerComparison, compare_scorers

__all__ = [
    "FaithfulnessCurve",
    "Minimality",
    "ScorerComparison",
    "compare_scorers",
    "faithfulness",
    "minimality",
]
