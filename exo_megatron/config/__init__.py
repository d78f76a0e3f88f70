"""Typed, frozen settings. This package imports no torch."""
