"""Benchmarks that anyone can run: `python -m tools.bench NAME`.

The figures are in docs/benchmarks.md.
"""
