"""Tensor rules of a model, built from the names that HF gives to its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exo_megatron.conversion.rules import SCORE, Shape, TensorRule
from exo_megatron.conversion.transforms import Transform, grouped_qkv, padded_rows, same, stacked_rows, transposed
from exo_megatron.models.spec import ModelSpec

Parts = Sequence[tuple[str, int]]
"""HF's names, in a layer, of linears that become one of ours, and their numbers of outputs."""

_LAYERS = "decoder.layers"
_EXPERTS = "mlp.experts.experts"


@dataclass(frozen=True)
class Table:
    """A builder of the rules of one model.

    Names of parts of a layer are given without the layer's prefix, and all names of linears and
    norms without `.weight` and `.bias`.

    Attributes:
        spec: the model.
        layer: prefix of HF's names in a layer; `{0}` stands for its number.
        input_first: whether HF stores the matrices of linears as [inputs, outputs] (GPT-2).
    """

    spec: ModelSpec
    layer: str
    input_first: bool = False

    def embedding(self, name: str) -> list[TensorRule]:
        """List the rule of the word embeddings, padded."""
        return [self._vocabulary("embedding.word_embeddings.weight", name)]

    def positions(self, name: str) -> list[TensorRule]:
        """List the rule of learned position embeddings."""
        shape = (self.spec.max_positions, self.spec.hidden_size)
        return [TensorRule("embedding.position_embeddings.weight", shape, ((f"{name}.weight", shape),), same())]

    def head(self, name: str) -> list[TensorRule]:
        """List the rule of the output layer or of a classifier's scores.

        There is none if the output layer is the embedding.
        """
        if self.spec.labels is not None:
            shape = (self.spec.labels, self.spec.hidden_size)
            return [TensorRule(SCORE, shape, ((SCORE, shape),), same())]
        return [] if self.spec.tied_embeddings else [self._vocabulary("output_layer.weight", name)]

    def final_norm(self, name: str) -> list[TensorRule]:
        """List the rules of the norm after the last layer."""
        return self._norm("decoder.final_layernorm", name, self.spec.hidden_size, ())

    def norm(self, key: str, name: str) -> list[TensorRule]:
        """List the rules of a norm of the hidden size in every layer."""
        return self._layer_norm(key, name, self.spec.hidden_size)

    def head_norms(self, query: str, key: str) -> list[TensorRule]:
        """List the rules of the norms of query and key heads, if the model has them."""
        if not self.spec.qk_norm:
            return []
        size = self.spec.head_dim
        return [
            *self._layer_norm("self_attention.q_layernorm", query, size),
            *self._layer_norm("self_attention.k_layernorm", key, size),
        ]

    def separate_qkv(self, query: str, key: str, value: str) -> list[TensorRule]:
        """List the rules of query, key and value projections, each a linear in HF."""
        spec = self.spec
        rows = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        parts = tuple(zip((query, key, value), rows, strict=True))
        return self._qkv(parts, grouped_qkv(spec.heads, spec.kv_heads, spec.head_dim))

    def fused_qkv(self, name: str, how: Transform) -> list[TensorRule]:
        """List the rules of query, key and value projections in one linear of HF.

        `how` converts its rows to ours.
        """
        return self._qkv([(name, (self.spec.heads + 2 * self.spec.kv_heads) * self.spec.head_dim)], how)

    def attention_output(self, name: str) -> list[TensorRule]:
        """List the rules of the projection after attention."""
        spec = self.spec
        parts, inputs = [(name, spec.hidden_size)], spec.heads * spec.head_dim
        return self._linear("self_attention.linear_proj", parts, inputs, same(), bias=spec.linear_bias)

    def feed_forward(self, up: Sequence[str], down: str) -> list[TensorRule]:
        """List the rules of the feed-forward block.

        `up` names gate and up projections, or one linear of all their rows.
        """
        spec = self.spec
        parts, how = self._up_parts(up)
        return [
            *self._linear("mlp.linear_fc1", parts, spec.hidden_size, how, bias=spec.linear_bias),
            *self._linear(
                "mlp.linear_fc2", [(down, spec.hidden_size)], spec.ffn_hidden_size, same(), bias=spec.linear_bias
            ),
        ]

    def experts(self, router: str, up: Sequence[str], down: str) -> list[TensorRule]:
        """List the rules of a mixture of experts.

        `{1}` in the names of the experts' linears stands for the number of the expert. Raises
        ValueError if the model has no experts.
        """
        spec = self.spec
        if spec.experts is None:
            raise ValueError("the model has no experts")
        parts, how = self._up_parts(up)
        stack = (spec.layers, spec.experts.count)
        return [
            *self._linear("mlp.router", [(router, spec.experts.count)], spec.hidden_size, same(), bias=False),
            *self._linear(f"{_EXPERTS}.linear_fc1", parts, spec.hidden_size, how, bias=False, stack=stack),
            *self._linear(
                f"{_EXPERTS}.linear_fc2",
                [(down, spec.hidden_size)],
                spec.ffn_hidden_size,
                same(),
                bias=False,
                stack=stack,
            ),
        ]

    def _up_parts(self, names: Sequence[str]) -> tuple[Parts, Transform]:
        outputs = self.spec.ffn_hidden_size * (2 if self.spec.gated else 1)
        if len(names) == 1:
            return [(names[0], outputs)], same()
        rows = outputs // len(names)
        return [(name, rows) for name in names], stacked_rows(*[rows] * len(names))

    def _qkv(self, parts: Parts, how: Transform) -> list[TensorRule]:
        spec = self.spec
        return self._linear("self_attention.linear_qkv", parts, spec.hidden_size, how, bias=spec.qkv_bias)

    def _vocabulary(self, key: str, name: str) -> TensorRule:
        rows, padded, hidden = self.spec.vocab_size, self.spec.padded_vocab_size, self.spec.hidden_size
        return TensorRule(key, (padded, hidden), ((f"{name}.weight", (rows, hidden)),), padded_rows(rows, padded))

    def _layer_norm(self, key: str, name: str, size: int) -> list[TensorRule]:
        return self._norm(f"{_LAYERS}.{key}", f"{self.layer}.{name}", size, (self.spec.layers,))

    def _norm(self, key: str, name: str, size: int, stack: Shape) -> list[TensorRule]:
        kinds = ("weight", "bias") if self.spec.norm == "layer" else ("weight",)
        return [TensorRule(f"{key}.{kind}", (size,), ((f"{name}.{kind}", (size,)),), same(), stack) for kind in kinds]

    def _linear(
        self, key: str, parts: Parts, inputs: int, how: Transform, *, bias: bool, stack: Shape = ()
    ) -> list[TensorRule]:
        """List the rules of the weight, and of the bias if there is one, of one of our linears.

        Args:
            key: our key in a layer.
            parts: HF's linears of which it is made.
            inputs: number of inputs.
            how: converts HF's rows to ours.
            bias: whether there is a bias.
            stack: sizes of the stacked axes; () for layers only.
        """
        outputs = sum(rows for _, rows in parts)
        stack = stack or (self.spec.layers,)

        def rule(kind: str, rest: Shape, transform: Transform, *, input_first: bool) -> TensorRule:
            sources = tuple(
                (f"{self.layer}.{name}.{kind}", (*rest, rows) if input_first else (rows, *rest)) for name, rows in parts
            )
            return TensorRule(f"{_LAYERS}.{key}.{kind}", (outputs, *rest), sources, transform, stack)

        weight_transform = transposed(how) if self.input_first else how
        rules = [rule("weight", (inputs,), weight_transform, input_first=self.input_first)]
        return [*rules, rule("bias", (), how, input_first=False)] if bias else rules
