"""Conversion between HF checkpoints and the tensors of a distributed checkpoint.

A model family is one table, see `families/`.
"""
