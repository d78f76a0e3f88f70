"""Plain PyTorch + HF transformers computations of the paper's formulas. Imports nothing of exo_megatron."""
