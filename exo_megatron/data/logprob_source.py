"""The source of a stored log-prob: model, temperature, precision and token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exo_megatron.data.records import finite_number, text

DIGEST_LENGTH = 16


@dataclass(frozen=True)
class LogprobSource:
    """The computation that log-probs came from.

    The topology is not part of it, because it changes them by no more than rounding.

    Attributes:
        fingerprint: fingerprint of the checkpoint (see read_fingerprint).
        temperature: the number by which logits were divided.
        precision: type of parameters and activations, as in compute.precision.
    """

    fingerprint: str
    temperature: float
    precision: str

    def digest(self, prompt: Sequence[int], candidate: Sequence[int]) -> str:
        """Return a digest of this source and the token ids: 16 hexadecimal digits.

        There is one for each candidate, so that records and candidates may be filtered, reordered,
        renamed and joined.
        """
        ids = (" ".join(map(str, tokens)) for tokens in (prompt, candidate))
        parts = (self.fingerprint, repr(self.temperature), self.precision, *ids)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:DIGEST_LENGTH]


def parse_source(where: str, fields: Mapping[str, Any]) -> LogprobSource:
    """Check the stored form and convert it to its types. Raises DataError at `where`."""
    return LogprobSource(
        fingerprint=text(where, fields, "fingerprint"),
        temperature=finite_number(where, fields, "temperature"),
        precision=text(where, fields, "precision"),
    )
