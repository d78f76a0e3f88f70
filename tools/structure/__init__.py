"""Counts of obstacles for a newcomer to the code. See `python -m tools.structure --help`."""
