"""A model of the smallest sizes with every kind of tensor of a Llama, for tests that build it themselves."""

from __future__ import annotations

from exo_megatron.models.spec import ModelSpec, Rotary

TINY_SPEC = ModelSpec(
    family="test",
    layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    heads=2,
    kv_heads=1,
    head_dim=8,
    vocab_size=40,
    max_positions=32,
    norm_epsilon=1e-5,
    rotary=Rotary(base=1e4, dim=8),
)
