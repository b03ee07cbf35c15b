"""Benchmarks: ratios against a named rival, measured in one run. ``make bench`` runs them all."""
