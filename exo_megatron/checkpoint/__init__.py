"""Distributed checkpoints: written atomically, verified by checksum, read without running what is in them.

A checkpoint is a directory:

    model.json      the ModelSpec
    hf/             config.json, tokenizer files, generation_config.json of the HF checkpoint it comes from
    weights/        tensors (and optimizer state) in megatron-core's `torch_dist` format; any topology loads them
    trainer.json    position of the training loop (kind "training" only)
    manifest.json   SHA-256 and size of every file, fingerprint of the weights; written last
"""
