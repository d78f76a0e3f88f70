"""Helpers that know nothing of models: files, tables, progress, metrics, the user's functions.

No module here imports torch, except for TensorBoard events when they are written.
"""
