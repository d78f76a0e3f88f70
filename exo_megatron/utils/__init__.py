"""Small things without any knowledge of models: files, stage markers, progress, metrics. Imports no torch."""
