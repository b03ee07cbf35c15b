"""The explorer of a circuit in a notebook. It runs the model; its figures are those of ``view``."""

from circuitlens.explorer.opening import explore

__all__ = ["explore"]
