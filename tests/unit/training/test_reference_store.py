"""Reference log-probs next to a run: found again for the same key only, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exo_megatron.data.groups import Group
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
from exo_megatron.training.reference import StoredKey, read_stored, store_logprobs
from exo_megatron.utils.progress import Progress

KEY = StoredKey(fingerprint="f", data="d", temperature=0.8, precision="fp32")
BARE = [Group("a", (3,), ((4, 2), (5, 2))), Group("b", (6,), ((7, 2), (8, 2), (9, 2)))]
LOGPS = [(-1.0 / 3.0, -123.456789012345678), (-0.1, -1e-17, -800.0000000001)]
COMPLETE = [replace(group, reference_logprobs=row) for group, row in zip(BARE, LOGPS, strict=True)]


class KnownReference:
    """Stands for a reference model, without one."""

    def complete(self, groups: list[Group], progress: Progress | None = None) -> list[Group]:
        assert groups == BARE
        return COMPLETE


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    with distributed_runtime() as runtime:
        yield runtime


def test_written_and_read_again(tmp_path: Path, runtime: Runtime) -> None:
    assert read_stored(tmp_path, KEY, BARE) is None
    assert store_logprobs(tmp_path, KEY, KnownReference(), BARE, runtime) == COMPLETE
    assert read_stored(tmp_path, KEY, BARE) == COMPLETE


@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"data": "e"}, {"temperature": 1.0}, {"precision": "bf16"}])
def test_another_reference_data_set_temperature_or_precision_is_computed_again(
    other: dict[str, object], tmp_path: Path, runtime: Runtime
) -> None:
    store_logprobs(tmp_path, KEY, KnownReference(), BARE, runtime)
    assert read_stored(tmp_path, replace(KEY, **other), BARE) is None
