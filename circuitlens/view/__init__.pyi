import circuitlens.explorer

from .classes import confusion_matrix
from .curves import faithfulness_curve, minimality_bars
from .fronts import transfer_fronts
from .gallery import figures_of, write_figures
from .graph import circuit_graph
from .heads import head_bars, head_heatmap, head_positions, overlap_matrix
from .notebook import notebook_pictures
from .paper import export, export_all
from .report import render_report, write_report
from .roles import head_card, margin_lens
from .scorers import scorer_agreement
from .strategy_grids import paired_differences, strategy_table
from .tokens import attention_pattern, attention_patterns, token_relevance
from .tradeoff import transfer_tradeoff
from .training import training_curves, weight_drift

explore = circuitlens.explorer.explore

__all__ = [
    "attention_pattern",
    "attention_patterns",
    "circuit_graph",
    "confusion_matrix",
    "explore",
    "export",
    "export_all",
    "faithfulness_curve",
    "figures_of",
    "head_bars",
    "head_card",
    "head_heatmap",
    "head_positions",
    "margin_lens",
    "minimality_bars",
    "notebook_pictures",
    "overlap_matrix",
    "paired_differences",
    "render_report",
    "scorer_agreement",
    "strategy_table",
    "token_relevance",
    "training_curves",
    "transfer_fronts",
    "transfer_tradeoff",
    "weight_drift",
    "write_figures",
    "write_report",
]
