"""Data that ranks tokenise together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exo_megatron.config.sections import DataConfig
from exo_megatron.data import cache, dataset
from exo_megatron.data.tokenizer import load_tokenizer
from exo_megatron.errors import DataError
from exo_megatron.parallel.runtime import Runtime


def load(runtime: Runtime, file: Path, tokenizer: Path, directory: Path) -> dict[str, Any]:
    """Load pairs in shards of two records, and tell which of them this rank has tokenised."""
    made: list[str] = []
    build, size = dataset.build_items, cache.SHARD_RECORDS

    def recorded(entries: Any, *rest: Any) -> Any:
        made.append(entries[0].where.rpartition(":")[2])
        return build(entries, *rest)

    told: list[str] = []
    try:
        dataset.build_items, cache.SHARD_RECORDS = recorded, 2
        config = DataConfig(path=str(file), cache=directory)
        groups = dataset.load_groups(
            config, load_tokenizer(tokenizer), purpose="preference", tell=told.append, team=runtime.team()
        )
    except DataError as error:
        return {"made": made, "error": str(error)}
    finally:
        dataset.build_items, cache.SHARD_RECORDS = build, size
    return {"made": made, "groups": list(groups), "digest": groups.digest, "told": told}
