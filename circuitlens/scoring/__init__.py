"""Scores: how much every head supports the task, by a named method, and circuits from them."""

from circuitlens.scoring.discovery import discover
from circuitlens.scoring.head_scores import HeadScores, Stability
from circuitlens.scoring.node_scores import NodeScores
from circuitlens.scoring.score_heads import relevance
from circuitlens.scoring.score_neurons import neuron_relevance
from circuitlens.scoring.scorers import METHODS, SCORERS

__all__ = [
    "METHODS",
    "SCORERS",
    "HeadScores",
    "NodeScores",
    "Stability",
    "discover",
    "neuron_relevance",
    "relevance",
]
