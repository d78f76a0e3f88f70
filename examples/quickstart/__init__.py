"""From nothing to an aligned model in a few minutes: corpus, tokenizer, tiny model, oracle, and the pipeline."""
