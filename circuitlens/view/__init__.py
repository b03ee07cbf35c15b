"""Figures and the report. Results go in; no model is needed to draw."""

from circuitlens.view.curves import faithfulness_curve
from circuitlens.view.heads import head_heatmap
from circuitlens.view.report import render_report, write_report
from circuitlens.view.transfers import transfer_tradeoff

__all__ = [
    "faithfulness_curve",
    "head_heatmap",
    "render_report",
    "transfer_tradeoff",
    "write_report",
]
