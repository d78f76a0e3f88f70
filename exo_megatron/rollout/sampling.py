"""Which token comes next: reproducible draws that do not depend on what else is in the batch.

Every draw uses one uniform number that is a function of (seed, prompt id, candidate, step) alone, and inverts the
cumulative distribution in vocabulary order in fp64. The same logits therefore give the same tokens whatever the
topology, the number of candidates decoded at once, or the order in which prompts were admitted.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10

CHUNK_ELEMENTS = 2**23
"""Logits handled at once in fp64: 64 MiB for each of a few temporaries."""


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words per counter, elementwise.

    counter: arrays of one shape that hold 32-bit values in uint64; key: two 32-bit values. Returns like counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(_ROUNDS):
        low, high = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (high >> _SHIFT) ^ c1 ^ k0, high & _MASK, (low >> _SHIFT) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: int, prompt_id: str, *, candidates: int, steps: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-53: [candidates, steps] fp64.

    Philox with the counter (candidate, step) and a key hashed from seed and prompt id, so that element [k, t] does
    not depend on how many candidates or steps are asked for.
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
    logits: Tensor, rows: Tensor, uniform: Tensor, *, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """One token per draw by inversion of the cumulative distribution.

    logits: [M, V] over the true vocabulary (no padding rows), any float dtype; not modified. rows: [D] int64, the
    row of logits that each draw is from. uniform: [D] fp64 in [0, 1).
    Returns (tokens [D] int64, log-probs [D] fp64): the token is the first v with P(id <= v) > uniform, P being
    softmax(logits / temperature) restricted to the smallest set of most likely tokens of mass at least top_p (ties
    to the lower id) and renormalised; the log-prob is under softmax(logits / temperature) without that restriction.
    All arithmetic in fp64, a bounded number of rows at a time. Local to the rank.
    """
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    parts = [
        _draw_chunk(logits[row_chunk], uniform_chunk, temperature, top_p)
        for row_chunk, uniform_chunk in zip(rows.split(step), uniform.split(step), strict=True)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _draw_chunk(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    scaled = logits.to(torch.float64).div_(temperature)
    scaled.sub_(scaled.amax(-1, keepdim=True))
    weights = scaled.exp()
    total = weights.sum(-1)
    kept = weights if top_p >= 1.0 else _nucleus(weights, top_p * total)
    cumulative = kept.cumsum(-1)
    # The largest uniform number is 1 - 2^-53: times the last sum it stays below it, so a token is always found.
    target = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    logprobs = scaled.gather(-1, tokens)[:, 0] - total.log()
    return tokens[:, 0], logprobs


def _nucleus(weights: Tensor, mass: Tensor) -> Tensor:
    """Weights [D, V] with all but the smallest set of largest ones that reaches `mass` [D] set to zero."""
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(weights).scatter_(-1, ids, ordered.masked_fill_(before >= mass[:, None], 0.0))
