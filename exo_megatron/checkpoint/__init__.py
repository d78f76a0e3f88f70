"""Distributed checkpoints: written atomically, verified by checksum, read without running code.

A checkpoint is a directory:

    model.json      the ModelSpec
    hf/             config.json, tokenizer files, generation_config.json of the HF checkpoint
    weights/        tensors (and optimizer state) in megatron-core's `torch_dist` format, which can
                    be loaded at any topology
    trainer.json    position of the training loop (kind "training" only)
    manifest.json   SHA-256 and size of every file, fingerprint of the weights; written last
"""
