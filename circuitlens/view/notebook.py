"""Pictures next to the figures of a notebook, for readers whose page runs no scripts."""

from __future__ import annotations

import importlib
import logging
import warnings

import plotly.io

from circuitlens.errors import InputError
from circuitlens.view.paper import picture_server

__all__ = ["notebook_pictures"]

logger = logging.getLogger(__name__)


def notebook_pictures() -> bool:
    """Put a PNG next to every figure that this notebook shows from here on.

    GitHub, nbviewer and PDF exports run no scripts: they show the picture. The figures stay
    interactive everywhere else. One browser is started and serves the whole notebook.

    Returns:
        Whether pictures are drawn. Without kaleido (``pip install circuitlens[figures]``) or a
        browser that works, figures are shown without them; the log says why.
    """
    plotly.io.renderers.default = "plotly_mimetype"
    try:
        # Kaleido's own server waits forever for a browser that is missing or does not start.
        options = picture_server()
    except InputError as error:
        logger.info("Figures come without pictures: %s", error)
        return False
    warnings.filterwarnings("ignore", message="The kopts argument")
    importlib.import_module("kaleido").start_sync_server(**options)
    plotly.io.renderers.default = "plotly_mimetype+png"
    return True
