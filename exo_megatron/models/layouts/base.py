"""The interface of layouts: what attention and the output of a model ask of a forward pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from exo_megatron.models.attention.passes import ScoreRule


class Layout(Protocol):
    """One forward pass over a packed sequence of S tokens.

    It is passed through megatron-core's forward as `packed_seq_params`, so that every micro-batch
    in flight and every recomputation has its own. Its tensors are on the model's device. Another
    way to lay out tokens, such as a slice of a sequence under context parallelism, is another
    implementation.
    """

    @property
    def qkv_format(self) -> str:
        """Name of the format for megatron-core; any but "thd" is passed to core attention."""
        ...

    @property
    def input_ids(self) -> Tensor:
        """Token ids [S] int64."""
        ...

    @property
    def position_ids(self) -> Tensor:
        """Position of every token in its text, [S] int64."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number S of tokens, padding included."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, rule: ScoreRule) -> Tensor:
        """Compute attention of every token over the tokens that it sees.

        Local to the rank; differentiable.

        Args:
            query: [S, hq, d], rotated, the local heads.
            key, value: [S, hkv, d], key rotated.
            layer_number: megatron-core's, from 1 over all pipeline stages.
            rule: how scores are made.

        Returns:
            [S, hq, d].
        """
        ...

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select the hidden states that predict tokens, [S, 1, H] -> [M, H].

        On the last pipeline stage.
        """
        ...

    def candidate_ends(self, hidden: Tensor) -> Tensor:
        """Select the hidden state of each candidate's last token, [S, 1, H] -> [C, H].

        On the last pipeline stage.
        """
        ...
