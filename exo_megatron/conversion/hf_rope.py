"""Rotary embeddings in HF configs.

transformers 5 has `rope_parameters`, transformers 4 has `rope_scaling` and keys beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.models.spec import Rotary, RotaryScaling

_DYNAMIC = "the frequencies of dynamic scaling depend on the length of the text"


@dataclass(frozen=True)
class RopeKeys:
    """The differences between the rotary keys of families.

    Attributes:
        base: the base if the config has none.
        base_key: name of the base beside the model's other keys.
        local_base: base of layers with a window if the config has none. None means that they have
            the same base as the others.
        partial: fraction of a head that is rotated if the config has none. None means that the
            family rotates whole heads.
        partial_key: name of that fraction beside the model's other keys.
        interleaved: whether neighbouring elements of a head form the rotated pairs.
        original: positions before scaling if the config has none beside the other keys. None means
            that they are read from the section of the scaling.
        kinds: kinds of scaling.
        aliases: other names of these kinds.
    """

    base: float = 10000.0
    base_key: str = "rope_theta"
    local_base: float | None = None
    partial: float | None = None
    partial_key: str = "partial_rotary_factor"
    interleaved: bool = False
    original: int | None = None
    kinds: tuple[str, ...] = ("linear", "llama3", "yarn", "longrope")
    aliases: tuple[tuple[str, str], ...] = ()


WHOLE_HEADS = RopeKeys()
"""The keys of most families."""


def read_rope(config: HfConfig, keys: RopeKeys, *, head_dim: int, positions: int) -> tuple[Rotary, int]:
    """Read the rotary embedding and the number of positions that it serves.

    Args:
        config: the model's config.
        keys: the keys of the family.
        head_dim: size of a head.
        positions: positions of the model.

    Returns:
        The embedding and `positions`, or fewer with longrope (see `_longrope`).

    Raises:
        CheckpointError: the config asks for something that is not supported.
    """
    rope, local_base = (_parameters(config), None) if keys.local_base is None else _by_layer(config, keys.local_base)
    base = rope.number("rope_theta") if "rope_theta" in rope.values else config.number(keys.base_key, keys.base)
    dim = _dim(config, rope, keys, head_dim)
    scaling = _scaling(config, rope, keys, dim, positions)
    if scaling is not None and scaling.kind == "longrope":
        positions = scaling.original_max_positions
    rotary = Rotary(base=base, dim=dim, interleaved=keys.interleaved, scaling=scaling, local_base=local_base)
    return rotary, positions


def _scaling(config: HfConfig, rope: HfConfig, keys: RopeKeys, dim: int, positions: int) -> RotaryScaling | None:
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(key)
    kind = dict(keys.aliases).get(kind, kind) if isinstance(kind, str) else kind
    if kind in (None, "default"):
        return None
    if kind not in keys.kinds:
        expected = " or ".join(repr(each) for each in ("default", *keys.kinds))
        raise rope.unsupported(key, kind, expected, _DYNAMIC if kind == "dynamic" else "")
    inside = rope.integer("original_max_position_embeddings", positions)
    original = config.integer("original_max_position_embeddings", keys.original or inside)
    return _READERS[kind](rope, _Lengths(dim, original, positions))


def _parameters(config: HfConfig) -> HfConfig:
    parameters, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    if parameters.values and scaling.values and dict(parameters.values) != dict(scaling.values):
        raise config.unsupported("rope_scaling", scaling.values, "one of rope_parameters and rope_scaling, not both")
    rope = parameters if parameters.values else scaling
    for key, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.unsupported(key, value, "one rotary embedding for all layers")
    return rope


def _by_layer(config: HfConfig, local_base: float) -> tuple[HfConfig, float]:
    """Return the section of layers that see all tokens, and the base of layers with a window."""
    nested, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    if not nested.values:
        return scaling, config.number("rope_local_base_freq", local_base)
    if scaling.values or nested.values.keys() - {"full_attention", "sliding_attention"}:
        raise config.unsupported("rope_parameters", nested.values, "only full_attention and sliding_attention")
    local = nested.section("sliding_attention")
    for key in ("rope_type", "type"):
        local.require(key, ("default",), "the rotary embedding of layers with a window is not scaled here")
    return nested.section("full_attention"), local.number("rope_theta", local_base)


def _dim(config: HfConfig, rope: HfConfig, keys: RopeKeys, head_dim: int) -> int:
    """Return the number of rotated elements of a head, rounded down as in transformers."""
    if keys.partial is None:
        for section in (rope, config):
            section.require(keys.partial_key, (1, 1.0), "transformers rotates whole heads of this family")
    inside = "partial_rotary_factor"
    section, key = (rope, inside) if inside in rope.values else (config, keys.partial_key)
    fraction = 1.0 if keys.partial is None else section.number(key, None if section is rope else keys.partial)
    if fraction > 1:
        raise section.unsupported(key, fraction, "at most 1")
    dim = int(head_dim * fraction)
    if dim % 2 and dim == head_dim:
        why = f"all {head_dim} elements of a head are rotated, in pairs"
        raise config.unsupported("head_dim", head_dim, "an even number", why)
    if dim % 2 or not dim:
        why = f"it rotates {dim} of the {head_dim} elements of a head"
        raise section.unsupported(key, fraction, "a fraction that makes this an even number", why)
    return dim


@dataclass(frozen=True)
class _Lengths:
    """Rotated elements of a head, positions before scaling, and positions of the model."""

    dim: int
    original: int
    positions: int


def _linear(rope: HfConfig, lengths: _Lengths) -> RotaryScaling:
    return RotaryScaling(kind="linear", factor=rope.number("factor"))


def _llama3(rope: HfConfig, lengths: _Lengths) -> RotaryScaling:
    return RotaryScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=lengths.original,
    )


def _yarn(rope: HfConfig, lengths: _Lengths) -> RotaryScaling:
    factor = rope.number("factor", lengths.positions / lengths.original)
    above, below = rope.optional_number("mscale", None), rope.optional_number("mscale_all_dim", None)
    if above is not None and below is not None:
        usual = _yarn_factor(factor, above) / _yarn_factor(factor, below)
    else:
        usual = _yarn_factor(factor, 1.0)
    return RotaryScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=lengths.original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", usual),
    )


def _yarn_factor(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: HfConfig, lengths: _Lengths) -> RotaryScaling:
    """Read the scaling of longrope for texts up to the original length.

    longrope has two sets of divisors, one for these texts and one for longer ones; transformers
    chooses by the longest text of a batch. The first set is converted, and the model is limited to
    the original length, where this is exact.
    """
    factor = rope.number("factor", lengths.positions / lengths.original)
    usual = math.sqrt(1 + math.log(factor) / math.log(lengths.original)) if factor > 1 else 1.0
    return RotaryScaling(
        kind="longrope",
        factor=factor,
        original_max_positions=lengths.original,
        frequency_divisors=rope.numbers("short_factor", lengths.dim // 2),
        attention_factor=rope.number("attention_factor", usual),
    )


_READERS: dict[str, Callable[[HfConfig, _Lengths], RotaryScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
