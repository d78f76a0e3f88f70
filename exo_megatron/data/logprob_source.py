"""What a stored log-prob belongs to: model, temperature, precision, and the token ids themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exo_megatron.data.fields import finite_number, text

DIGEST_LENGTH = 16


@dataclass(frozen=True)
class LogprobSource:
    """How log-probs were computed. Says nothing of the topology, which changes them by no more than rounding.

    fingerprint: of the checkpoint (see read_fingerprint). temperature: by which logits were divided. precision: of
    parameters and activations, as compute.precision says it.
    """

    fingerprint: str
    temperature: float
    precision: str

    def digest(self, prompt: Sequence[int], candidate: Sequence[int]) -> str:
        """Ties a number to this source and to the token ids: 16 hexadecimal digits.

        A candidate at a time, so that records and candidates may be filtered, reordered, renamed and put together.
        """
        ids = (" ".join(map(str, tokens)) for tokens in (prompt, candidate))
        parts = (self.fingerprint, repr(self.temperature), self.precision, *ids)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:DIGEST_LENGTH]


def parse_source(where: str, fields: Mapping[str, Any]) -> LogprobSource:
    """Check the stored form and give it its types; DataError at `where`."""
    return LogprobSource(
        fingerprint=text(where, fields, "fingerprint"),
        temperature=finite_number(where, fields, "temperature"),
        precision=text(where, fields, "precision"),
    )
