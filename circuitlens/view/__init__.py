"""Figures, the explorer and the report. Results go in; no model is needed to draw."""

from circuitlens.view.agreement import scorer_agreement
from circuitlens.view.curves import faithfulness_curve, minimality_bars
from circuitlens.view.explorer import explore
from circuitlens.view.export import export, export_all
from circuitlens.view.gallery import figures_of, write_figures
from circuitlens.view.graph import circuit_graph
from circuitlens.view.heads import head_bars, head_heatmap, head_positions, overlap_matrix
from circuitlens.view.languages import paired_differences, strategy_table
from circuitlens.view.report import render_report, write_report
from circuitlens.view.tokens import attention_pattern, attention_patterns, token_relevance
from circuitlens.view.training import training_curves, weight_drift
from circuitlens.view.transfers import transfer_tradeoff

__all__ = [
    "attention_pattern",
    "attention_patterns",
    "circuit_graph",
    "explore",
    "export",
    "export_all",
    "faithfulness_curve",
    "figures_of",
    "head_bars",
    "head_heatmap",
    "head_positions",
    "minimality_bars",
    "overlap_matrix",
    "paired_differences",
    "render_report",
    "scorer_agreement",
    "strategy_table",
    "token_relevance",
    "training_curves",
    "transfer_tradeoff",
    "weight_drift",
    "write_figures",
    "write_report",
]
