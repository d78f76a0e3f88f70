"""The command line: one thin command per stage, the workflow of `run`, and `doctor`."""
