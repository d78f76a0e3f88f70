"""The model: megatron-core's GPTModel on rows of candidate groups.

A policy ends in hidden states instead of logits, a reward model in one row of scores per candidate.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from exo_megatron.models.decode import Layout
from exo_megatron.models.heads import ScoreHead
from exo_megatron.models.layout import GroupLayout
from exo_megatron.models.shared_prompt import PartLayout, PromptLayout
from exo_megatron.models.spec import ModelSpec

# megatron-core 0.19 warns on every construction that GPTModel is in maintenance; both supported versions have it.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


class PolicyModel(GPTModel):
    """One pipeline stage of the model. `packed_seq_params` carries the layout, with the position of every token.

    The last stage of a policy returns hidden states, complete on every tensor-parallel rank, whose backward sums the
    partial gradients of the ranks: under sequence parallelism gather forward, reduce-scatter backward; without it
    identity forward, all-reduce backward. What follows (a vocabulary-parallel projection) must therefore return each
    rank's own partial gradient and not reduce it again.

    The last stage of a reward model (`spec.labels`) returns scores [C, labels] fp32 of the candidates, read off at
    their last tokens, equal on every tensor-parallel rank. Forward only: nothing trains a reward model yet.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        spec: ModelSpec,
        *,
        is_first_stage: bool,
        is_last_stage: bool,
    ) -> None:
        """Uninitialised parameters on this process's device: weights always come from a checkpoint."""
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=spec.padded_vocab_size,
            max_sequence_length=spec.max_positions,
            pre_process=is_first_stage,
            post_process=is_last_stage,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="none" if spec.rotary is not None else "learned_absolute",
        )
        self.embedding_scale = spec.embedding_scale
        self.has_scores = spec.labels is not None
        if is_last_stage and spec.labels is not None:
            self.output_layer = ScoreHead(spec.labels, spec.hidden_size, config.params_dtype)

    def output_weight(self) -> Tensor:
        """This rank's vocabulary shard of the output projection [Vp/t, H]; the last stage only."""
        weight: Tensor
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """megatron-core's sharded tensors of this stage, without `_extra_state` (pickled fp8 state: empty).

        The head of a reward model is called `score.weight` in checkpoints.
        """
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        if self.has_scores and self.post_process:
            state["output_layer.weight"].key = "score.weight"
        return {key: value for key, value in state.items() if not key.endswith("._extra_state")}

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        packed_seq_params: Layout,
        **kwargs: Any,
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """Embed on the first stage. Core attention rotates by the layout's positions: there are no angles here."""
        if not self.pre_process:
            return None, None, None, None, None, None
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if self.embedding_scale is not None:
            hidden = hidden * torch.tensor(self.embedding_scale, dtype=hidden.dtype)
        return hidden, None, None, None, None, None

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: Layout, **kwargs: Any) -> Tensor:
        """Other stages: hidden states as they are. Last: [M, H] of the predicting rows; [S, 1, H] to decode.

        Of a prompt in front of parts: its last row [1, H], of a part: that row and the part's own. Of a reward model:
        scores [C, labels].
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
        if isinstance(packed_seq_params, PromptLayout):
            last = hidden_states[packed_seq_params.row.predict_rows, 0]
            packed_seq_params.shared.keep_hidden(last)
            return last
        if isinstance(packed_seq_params, PartLayout):
            return packed_seq_params.predicting(hidden_states[packed_seq_params.row.predict_rows, 0])
        if not isinstance(packed_seq_params, GroupLayout):
            return hidden_states
        if self.has_scores:
            scores: Tensor = self.output_layer(hidden_states[packed_seq_params.last_rows, 0])
            return scores
        return hidden_states[packed_seq_params.predict_rows, 0]
