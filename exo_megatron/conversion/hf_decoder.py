"""Reading of ModelSpec values from keys that the HF configs of several families share.

Keys of dropout and of the router's losses are never read: they are settings of the training that
made the model. Inference ignores them, and training here does not use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from exo_megatron.conversion.hf_config import HfConfig
from exo_megatron.conversion.hf_rope import WHOLE_HEADS, RopeKeys, read_rope
from exo_megatron.errors import CheckpointError, reason
from exo_megatron.models.spec import LARGEST_LAYERS, Experts, ModelSpec

Activation = Literal["silu", "gelu", "gelu_tanh"]
ConfigReader = Callable[[Mapping[str, Any], str], ModelSpec]

CLASSIFIER = "ForSequenceClassification"
"""End of the names of sequence classifiers in `architectures`."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    # All of these names mean the same function.
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class DecoderDefaults:
    """The defaults of a family for absent keys, as in its configuration class in transformers.

    kv_heads is None if the default is one per attention head, head_dim is None if it is hidden_size
    / heads.
    """

    positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    norm_epsilon: float = 1e-6
    tied: bool = False
    rope: RopeKeys = WHOLE_HEADS


def with_head(read: Callable[[HfConfig], ModelSpec]) -> ConfigReader:
    """Return a reader of a family's language models and sequence classifiers.

    `read` reads its language models only.
    """

    def read_config(values: Mapping[str, Any], where: str) -> ModelSpec:
        config = HfConfig(values, where)
        try:
            spec = read(config)
        except ValidationError as error:
            raise CheckpointError(
                where,
                f"describes no model ({reason(error)})",
                expected="the sizes of a model",
                fix="restore the config.json that came with the weights",
            ) from None
        labels = _labels(config)
        if labels is None:
            return spec
        return spec.model_copy(update={"labels": labels, "tied_embeddings": False, "logit_softcap": None})

    return read_config


def read_decoder(config: HfConfig, defaults: DecoderDefaults, **rest: Any) -> ModelSpec:
    """Read a decoder with RMSNorm, rotary positions and grouped heads, from keys as Llama's.

    `rest` holds fields of ModelSpec that the family adds; they take precedence.
    """
    hidden = config.integer("hidden_size")
    heads, kv_heads, head_dim = read_heads(config, hidden, defaults)
    rotary, positions = read_rope(
        config,
        defaults.rope,
        head_dim=head_dim,
        positions=config.integer("max_position_embeddings", defaults.positions),
    )
    fields: dict[str, Any] = {
        "layers": config.integer("num_hidden_layers", maximum=LARGEST_LAYERS),
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": config.integer("vocab_size"),
        "max_positions": positions,
        "norm_epsilon": config.number("rms_norm_eps", defaults.norm_epsilon),
        "rotary": rotary,
        "tied_embeddings": config.flag("tie_word_embeddings", defaults.tied),
    }
    if "ffn_hidden_size" not in rest:
        fields["ffn_hidden_size"] = config.integer("intermediate_size")
    if "activation" not in rest:
        fields["activation"] = read_activation(config, "hidden_act", "silu")
    return ModelSpec(**fields | rest)


def read_heads(config: HfConfig, hidden: int, defaults: DecoderDefaults) -> tuple[int, int, int]:
    """Read the number of attention heads, that of key/value heads, and the size of a head."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.optional_integer("num_key_value_heads", defaults.kv_heads) or heads
    if heads % kv_heads:
        raise config.unsupported("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    head_dim = config.integer("head_dim", defaults.head_dim or even_share(config, hidden, heads))
    return heads, kv_heads, head_dim


def even_share(config: HfConfig, hidden: int, heads: int, key: str = "num_attention_heads") -> int:
    """Return hidden_size / heads. Raises CheckpointError if it is needed and not whole."""
    if hidden % heads and config.values.get("head_dim") is None:
        raise config.unsupported(key, heads, f"a divisor of hidden_size ({hidden})")
    return hidden // heads


def read_activation(config: HfConfig, key: str, default: str) -> Activation:
    """Read the name of an activation in transformers and return ours."""
    name = config.values.get(key)
    name = default if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise config.unsupported(key, name, " or ".join(repr(each) for each in _ACTIVATIONS))
    return _ACTIVATIONS[name]


def read_layer_types(config: HfConfig, layers: int, is_sliding: Callable[[int], bool]) -> list[bool]:
    """Return for every layer whether it has a window.

    `is_sliding` is the family's rule for a config without `layer_types`.
    """
    types = config.values.get("layer_types")
    if types is None:
        return [is_sliding(layer) for layer in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(each not in known for each in types):
        raise config.unsupported("layer_types", types, f"{layers} entries that are {' or '.join(known)}")
    return [each == "sliding_attention" for each in types]


def windows(config: HfConfig, sliding: Sequence[bool], window: int | None, positions: int) -> tuple[int | None, ...]:
    """Return ModelSpec.windows.

    `window` is that of the sliding layers. A window that holds all positions counts as none.
    """
    if any(sliding) and window is None:
        raise config.unsupported("sliding_window", None, "a number, because some layers have a window")
    if window is None or window >= positions or not any(sliding):
        return ()
    return tuple(window if each else None for each in sliding)


def with_window(config: HfConfig, spec: ModelSpec, window: int | None) -> ModelSpec:
    """Return the model with the same window in all layers, or with none."""
    found = windows(config, [window is not None] * spec.layers, window, spec.max_positions)
    return spec.model_copy(update={"windows": found})


def with_upper_windows(config: HfConfig, spec: ModelSpec) -> ModelSpec:
    """Return the model with the windows of a Qwen config.

    It has none, or one in the layers from `max_window_layers` on.
    """
    window = config.optional_integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    full = config.integer("max_window_layers", 28, minimum=0)
    sliding = read_layer_types(config, spec.layers, lambda layer: window is not None and layer >= full)
    return spec.model_copy(update={"windows": windows(config, sliding, window, spec.max_positions)})


def read_experts(config: HfConfig, *, count: int, per_token: int, ffn_hidden_size: int, normalized: bool) -> Experts:
    """Return the mixture of experts.

    Raises CheckpointError if a token takes more experts than there are, or the router could not be
    trained.
    """
    if per_token > count:
        raise config.unsupported("num_experts_per_tok", per_token, f"at most the {count} experts")
    if per_token == 1 and normalized:
        why = "its weight is normalised to 1, through which the router cannot learn"
        raise config.unsupported("num_experts_per_tok", per_token, "at least 2, or weights not normalised", why)
    return Experts(count=count, per_token=per_token, ffn_hidden_size=ffn_hidden_size, normalized=normalized)


def forbid_attention_bias(config: HfConfig) -> None:
    """Refuse biases of attention.

    This is for families where `attention_bias` includes the attention output, and the feed-forward
    block has no biases.
    """
    config.require("attention_bias", (False,), "biases of attention alone are not supported in this family")


def _labels(config: HfConfig) -> int | None:
    """Return the outputs of a sequence classifier, None for another model.

    The default of transformers is 2.
    """
    architectures = config.values.get("architectures") or [""]
    if not architectures[0].endswith(CLASSIFIER):
        return None
    named = config.section("id2label").values
    count = config.integer("num_labels", len(named) or 2)
    if named and count != len(named):
        raise config.unsupported("num_labels", count, f"{len(named)}, as id2label has")
    return count
