"""The decomposition engine: how far the deviation of a head from its mean moves an output.

It speaks hooks, not architectures. A rule set says what stays as in the clean run; relevance by
*difference* patches a source and runs the network with those parts frozen; relevance by *gradient*
linearises that network and gets every source from one backward pass.

The published rules freeze nothing and need an architecture they know; they are separate, in
:func:`decompose`.
"""

from circuitlens.cdt.decomposing import decompose
from circuitlens.cdt.decomposition import Decomposition
from circuitlens.cdt.difference import FrozenNetwork, Source, relevance_by_difference
from circuitlens.cdt.gradient import LinearisedRun, Path, project, relevance_by_gradient
from circuitlens.cdt.operating_point import OperatingPoint
from circuitlens.cdt.path import relevance_along_path
from circuitlens.cdt.relevances import Relevances
from circuitlens.cdt.rules import RULES, RuleSet

__all__ = [
    "RULES",
    "Decomposition",
    "FrozenNetwork",
    "LinearisedRun",
    "OperatingPoint",
    "Path",
    "Relevances",
    "RuleSet",
    "Source",
    "decompose",
    "project",
    "relevance_along_path",
    "relevance_by_difference",
    "relevance_by_gradient",
]
