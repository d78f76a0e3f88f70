"""Resolved configurations as text, as files and as digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from exo_megatron.config.document import dump_yaml
from exo_megatron.config.sections import Section


def render_config(config: Section) -> str:
    """YAML with every key, defaults included. Loading it gives an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_config(config: Section, path: Path) -> None:
    """Write `render_config` to a file."""
    path.write_text(render_config(config), encoding="utf-8")


def config_digest(config: Section, upstream: Mapping[str, str] | None = None) -> str:
    """SHA-256, in hexadecimal, of a resolved configuration: of its JSON with sorted keys and no white space.

    upstream: name -> digest of the stages of a pipeline whose output this configuration reads. Their digests are
    part of the result, so that a change of theirs is a change here. Without any it is the configuration's own digest.
    """
    value: object = config.model_dump(mode="json")
    if upstream:
        value = {"config": value, "upstream": dict(upstream)}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
