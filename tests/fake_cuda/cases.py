"""The cases: what is done, with which model, cut and settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from tests.fake_cuda.models import DIFFERENCES, WINDOWED


@dataclass(frozen=True)
class Case:
    """A piece of the project's work on one rank.

    work: "train", "train_oversized" (a step with a group larger than a micro-batch), "decode" or "score".
    data: number of model copies.
    in_ci: whether it belongs to the third that always runs.
    """

    work: str
    family: str = "llama"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    rank: int = 0
    precision: str = "bf16"
    recompute: str = "none"
    in_ci: bool = False

    @property
    def name(self) -> str:
        """Everything that differs from the plainest case."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data, "ep": self.expert}
        cut = [f"{letters}{size}" for letters, size in sizes.items() if size > 1]
        parts = [self.work, self.family, *cut, self.precision]
        parts += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
        return "-".join(parts + ([f"rank{self.rank}"] if self.world_size > 1 else []))

    @property
    def world_size(self) -> int:
        """Number of ranks, of which only `rank` exists."""
        return self.tensor * self.pipeline * self.data

    @property
    def layers(self) -> tuple[int, int]:
        """Sizes of the two models, whose difference is one layer on a pipeline stage; two where windows alternate."""
        step = (2 if self.family in WINDOWED else 1) * self.pipeline
        return step, 2 * step


PLAIN = Case("train")
TP2 = replace(PLAIN, tensor=2)
PP2 = replace(PLAIN, pipeline=2)
CASES = (
    replace(PLAIN, in_ci=True),
    replace(TP2, in_ci=True),
    replace(TP2, rank=1),
    replace(PLAIN, data=2),
    replace(TP2, data=2),
    *(replace(PLAIN, recompute=recompute, in_ci=True) for recompute in ("selective", "full")),
    *(replace(TP2, recompute=recompute) for recompute in ("selective", "full")),
    replace(PLAIN, work="train_oversized"),
    replace(TP2, work="train_oversized", in_ci=True),
    replace(PLAIN, family="large", in_ci=True),
    replace(TP2, family="large_tied"),
    *(
        replace(cut, family=family, in_ci=(family, cut) in (("gpt2", PLAIN), ("gemma2", TP2), ("moe", TP2)))
        for family in DIFFERENCES
        for cut in (PLAIN, TP2)
        if family not in ("llama", "large", "large_tied")
    ),
    *(replace(TP2, family="moe", expert=2, data=data) for data in (1, 2)),
    replace(PLAIN, family="moe", expert=2, data=2),
    *(replace(cut, precision="fp32", in_ci=cut is PLAIN) for cut in (PLAIN, TP2)),
    *(replace(cut, work="decode", in_ci=cut is TP2) for cut in (PLAIN, TP2)),
    *(replace(PP2, rank=rank, in_ci=True) for rank in range(2)),
    *(replace(PP2, work=work, rank=rank) for work in ("train_oversized", "decode", "score") for rank in range(2)),
    *(replace(cut, work="score", in_ci=cut is TP2) for cut in (PLAIN, TP2)),
)


def chosen(*works: str) -> list[Case]:
    """The cases of this work that are to be run: those of CI, or all where EXO_FAKE_CUDA=all."""
    everything = os.environ.get("EXO_FAKE_CUDA") == "all"
    return [case for case in CASES if case.work in works and (everything or case.in_ci)]
