"""Grids of transfers: strategies × languages × seeds, and what to say about differences."""

from circuitlens.experiments.comparison import Comparison
from circuitlens.experiments.grid import compare
from circuitlens.experiments.on_ray import RayCluster
from circuitlens.experiments.paired import PairedDifference
from circuitlens.experiments.simple_rivals import SimpleRival, simple_rival

__all__ = [
    "Comparison",
    "PairedDifference",
    "RayCluster",
    "SimpleRival",
    "compare",
    "simple_rival",
]
