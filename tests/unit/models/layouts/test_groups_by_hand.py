"""The layout of candidate groups, against one written out by hand."""

from __future__ import annotations

import torch

from exo_megatron.models.layouts.groups import build_layout

# Two groups. Tokens of the micro-batch:
#   0 1 2 | 3 4 | 5       prompt 10 11 12, y_1 = 20 21, y_2 = 22
#   6 | 7 | 8 9 10 | 11   prompt 13, y_1 = 23, y_2 = 24 25 26, y_3 = 27
PROMPTS = [[10, 11, 12], [13]]
CANDIDATES = [[[20, 21], [22]], [[23], [24, 25, 26], [27]]]


def test_written_out_by_hand() -> None:
    layout = build_layout(PROMPTS, CANDIDATES, multiple=8)
    assert layout.num_tokens == 16
    assert layout.input_ids.tolist() == [10, 11, 12, 20, 21, 22, 13, 23, 24, 25, 26, 27, 0, 0, 0, 0]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3, 1, 0, 1, 2, 3]
    assert layout.segment_lengths == (3, 2, 1, 1, 1, 3, 1, 4)
    assert layout.segment_cu_seqlens.tolist() == [0, 3, 5, 6, 7, 8, 11, 12, 16]
    assert layout.candidate_index.tolist() == [3, 4, 5, 7, 8, 9, 10, 11]
    assert layout.prompt_index.tolist() == [0, 1, 2, 6]
    assert layout.candidates_cu_seqlens.tolist() == [0, 3, 8]
    assert layout.prompts_cu_seqlens.tolist() == [0, 3, 4]
    # Token 2 predicts 20 and 22, 3 predicts 21; 6 predicts 23, 24 and 27, 8 predicts 25, 9 predicts 26.
    assert layout.predict_index.tolist() == [2, 3, 6, 8, 9]
    assert layout.token_predictor.tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert layout.token_target.tolist() == [20, 22, 21, 23, 24, 27, 25, 26]
    assert layout.token_candidate.tolist() == [0, 1, 0, 2, 3, 4, 3, 3]
    assert layout.token_order.tolist() == [0, 2, 1, 3, 4, 7, 5, 6]
    assert layout.candidate_lengths.tolist() == [2, 1, 1, 3, 1]
    assert layout.group_sizes == (2, 3)
    assert sum(layout.group_sizes) == 5
    segments = layout.segment_pass()
    assert max(segments.query_lengths) == max(segments.key_lengths) == segments.longest == 4


def test_no_padding_where_the_number_of_tokens_divides() -> None:
    layout = build_layout(PROMPTS, CANDIDATES, multiple=4)
    assert layout.num_tokens == 12
    assert layout.segment_lengths == (3, 2, 1, 1, 1, 3, 1)


def test_every_token_is_predicted_by_the_one_before_it() -> None:
    """Natural order recovers the candidates; the predicting token is the previous one or the last of the prompt."""
    layout = build_layout(PROMPTS, CANDIDATES)
    natural = torch.empty_like(layout.token_target)
    natural[layout.token_order] = layout.token_target
    assert natural.tolist() == [token for group in CANDIDATES for y in group for token in y]
    predicted_position = layout.position_ids[layout.predict_index[layout.token_predictor]] + 1
    by_order = torch.empty_like(predicted_position)
    by_order[layout.token_order] = predicted_position
    assert by_order.tolist() == layout.position_ids[layout.candidate_index].tolist()


def test_micro_batch_without_groups_is_padding_that_predicts_nothing() -> None:
    layout = build_layout([], [], multiple=2)
    assert layout.num_tokens == 2
    assert layout.segment_lengths == (2,)
    assert layout.predict_index.numel() == layout.token_predictor.numel() == layout.candidate_index.numel() == 0
    assert layout.group_sizes == () and sum(layout.group_sizes) == 0
