"""Counts of what a newcomer to the code meets. `python -m tools.structure --help` tells how to use them."""
