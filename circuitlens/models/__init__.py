"""Models: one set of weights in two views, the heads in them, and how they are loaded."""
