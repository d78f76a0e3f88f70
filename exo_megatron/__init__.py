"""exo-megatron: efficient exact optimization (EXO, arXiv 2402.00856) of language models on megatron-core."""

__version__ = "0.1.0"
