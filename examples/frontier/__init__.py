"""When to use EXO and when DPO: both losses on policies whose KL is known exactly, swept and compared."""
