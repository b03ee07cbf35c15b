"""Figures and the report. Results go in; no model is needed to draw."""

from circuitlens.view.figures import faithfulness_curve, head_heatmap, transfer_tradeoff
from circuitlens.view.report import render_report, write_report

__all__ = [
    "faithfulness_curve",
    "head_heatmap",
    "render_report",
    "transfer_tradeoff",
    "write_report",
]
