"""Reproducible draws of the next token, which do not depend on what else is in the batch.

Every draw uses one uniform number that is a function of (seed, prompt id, candidate, step) alone,
and inverts the cumulative distribution in vocabulary order in fp64. The same logits therefore give
the same tokens for every topology, number of candidates decoded at once, and order in which prompts
were admitted.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exo_megatron.config.sections import SamplingConfig

Words = npt.NDArray[np.uint64]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10

CHUNK_ELEMENTS = 2**23
"""Number of logits handled at once in fp64: 64 MiB for each of a few temporaries."""


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Compute Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words per counter, elementwise.

    counter: arrays of one shape that hold 32-bit values in uint64; key: two 32-bit values. Returns
    arrays like counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(_ROUNDS):
        low, high = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (high >> _SHIFT) ^ c1 ^ k0, high & _MASK, (low >> _SHIFT) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: int, prompt_id: str, *, candidates: int, steps: int) -> npt.NDArray[np.float64]:
    """Make numbers in [0, 1), multiples of 2^-53: [candidates, steps] fp64.

    Philox with the counter (candidate, step) and a key hashed from seed and prompt id, so that
    element [k, t] does not depend on how many candidates or steps are asked for.
    """
    digest = hashlib.blake2b(f"{seed}\n{prompt_id}".encode(), digest_size=8).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
    shape = (candidates, steps)
    candidate = np.broadcast_to(np.arange(candidates, dtype=np.uint64)[:, None], shape)
    step = np.broadcast_to(np.arange(steps, dtype=np.uint64)[None, :], shape)
    zero = np.zeros(shape, dtype=np.uint64)
    first, second, _, _ = philox4x32((candidate, step, zero, zero), key)
    bits = (first << np.uint64(21)) | (second >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def draw_tokens(
    logits: Tensor, places: Tensor, uniform: Tensor, sampling: SamplingConfig, absent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw tokens by inversion of the cumulative distribution.

    All arithmetic is in fp64, for a bounded number of draws at a time. Local to the rank.

    Args:
        logits: [M, V] over the vocabulary without padding, any float dtype; not modified.
        places: [D] int64, the row of logits that each draw is from.
        uniform: [D] fp64 in [0, 1).
        sampling: gives temperature and top_p.
        absent: ids that are no token and are never drawn, int64; None if there are none.

    Returns:
        Tokens [D] int64 and log-probs [D] fp64. The token is the first v with P(id <= v) > uniform,
        where P is softmax(logits / temperature) without `absent`, restricted to the smallest set of
        most likely tokens of mass at least top_p (ties to the lower id) and renormalised. The log-prob is under
        softmax(logits / temperature) without that restriction.
    """
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    parts = [
        _draw_chunk(logits[place_chunk], uniform_chunk, sampling, absent)
        for place_chunk, uniform_chunk in zip(places.split(step), uniform.split(step), strict=True)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _draw_chunk(
    logits: Tensor, uniform: Tensor, sampling: SamplingConfig, absent: Tensor | None
) -> tuple[Tensor, Tensor]:
    scaled = logits.to(torch.float64).div_(sampling.temperature)
    normaliser = scaled.logsumexp(-1)
    present = scaled if absent is None else scaled.index_fill(-1, absent, -torch.inf)
    weights = (present - present.amax(-1, keepdim=True)).exp_()
    total = weights.sum(-1)
    kept = weights if sampling.top_p >= 1.0 else _nucleus(weights, sampling.top_p * total)
    cumulative = kept.cumsum(-1)
    # The largest uniform number is 1 - 2^-53: times the last sum it stays below it, so a token is
    # always found.
    target = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    logprobs = scaled.gather(-1, tokens)[:, 0] - normaliser
    return tokens[:, 0], logprobs


def _nucleus(weights: Tensor, mass: Tensor) -> Tensor:
    """Keep the smallest set of largest weights [D, V] that reaches `mass` [D]; others become 0."""
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(weights).scatter_(-1, ids, ordered.masked_fill_(before >= mass[:, None], 0.0))
