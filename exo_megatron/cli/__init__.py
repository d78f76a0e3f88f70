"""The command line: one thin command per stage, the pipeline of `run`, and `doctor`."""
