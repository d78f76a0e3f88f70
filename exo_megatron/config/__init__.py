"""Typed, frozen settings. Imports no torch."""
