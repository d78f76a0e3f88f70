"""What makes another directory of tokenised data, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.losses import LossSpec
from exo_megatron.config.sections import DataConfig
from exo_megatron.data import cache, dataset
from exo_megatron.data.dataset import load_groups, load_prompts
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer

PAIR = {"id": "a", "prompt": "The movie", "chosen": " was good .", "rejected": " was bad ."}
REWARDED = {"id": "b", "prompt": "It", "completions": [" was good .", " was bad ."], "rewards": [1, 0]}


class TestKey:
    @pytest.fixture
    def start(self, tmp_path: Path, spm: Tokenizer) -> Callable[..., Path | None]:
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps(PAIR) + "\n" + json.dumps(REWARDED) + "\n")

        def start(*, tokenizer: Tokenizer = spm, purpose: Any = "preference", **settings: Any) -> Path:
            data = {"path": str(file), "cache": tmp_path / "cache", **settings.pop("data", {})}
            config, known = DataConfig(**data), set((tmp_path / "cache").glob("*"))
            if purpose == "prompts":
                load_prompts(config, tokenizer)
            else:
                load_groups(config, tokenizer, purpose=purpose, **settings)
            (made,) = set(config.cache.glob("*")) - known or {None}
            return made

        return start

    # on_invalid, which is no part of the key, lets the record pass that is no pair.
    @pytest.mark.parametrize(
        "settings",
        [
            {"data": {"max_prompt_tokens": 99}},
            {"data": {"max_completion_tokens": 99}},
            {"data": {"limit": 1}},
            {
                "data": {
                    "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
                    "on_invalid": "skip",
                }
            },
            {"data": {"on_overlong": "truncate_prompt_left"}},
            {"purpose": "prompts"},
            {"purpose": "sft", "data": {"on_invalid": "skip"}},
            {"candidates": 2},
            {"loss": LossSpec("none", "preference", ("beta_pi",), several_rejected=True)},
        ],
        ids=str,
    )
    def test_another_setting_is_another_directory(self, start: Callable[..., Path | None], settings: Any) -> None:
        assert start() is not None
        assert start(**settings) is not None
        assert start(**settings) is None

    def test_loss_fields(self, start: Callable[..., Path | None], tmp_path: Path) -> None:
        row = {**REWARDED, "log_weights": [0, 0]}
        (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
        settings: list[dict[str, Any]] = [
            {},
            {"loss": LossSpec("none", "rewards", ("beta_pi",))},
            {"loss": LossSpec("none", "rewards", ("beta_pi",), log_weights=True)},
        ]
        assert all(start(purpose="rewards", **each) is not None for each in settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"data": {"on_invalid": "skip"}},
            {"data": {"on_overlong": "skip"}},
            {"ties": "skip"},
            {"temperature": 0.5},
        ],
        ids=str,
    )
    def test_what_becomes_of_bad_records_is_judged_afterwards(
        self, start: Callable[..., Path | None], settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert start() is not None
        monkeypatch.setattr(dataset, "build_items", None)
        assert start(**settings) is None

    def test_content(self, start: Callable[..., Path | None], tmp_path: Path) -> None:
        first, file = start(), tmp_path / "data.jsonl"
        text = file.read_text()
        file.write_text(text.replace("movie", "plots"))
        assert start() not in (None, first)
        file.write_text(text)
        assert start() is None

    def test_tokenizer(
        self, start: Callable[..., Path | None], spm: Tokenizer, chat: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = "{% for m in messages %}{{ m['content'] }}{{ 1 if deep }}{% endfor %}"
        others = [
            spm,
            chat,
            load_tokenizer(chat.path, chat_template=template),
            *(
                load_tokenizer(chat.path, chat_template=template, template_kwargs={"deep": deep})
                for deep in (True, False)
            ),
            chat.stopping_at([7]),
            chat.fitted_to(500),
        ]
        assert all(start(tokenizer=tokenizer) is not None for tokenizer in others)
        assert start(tokenizer=load_tokenizer(chat.path)) is None

    def test_the_place_of_the_cache(
        self, start: Callable[..., Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = start(), start(data={"cache": tmp_path / "other"})
        assert first is not None and second is not None and second.parent == tmp_path / "other"
        assert first.name == second.name and {path.name: path.read_bytes() for path in first.iterdir()} == {
            path.name: path.read_bytes() for path in second.iterdir()
        }
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.default_cache() == tmp_path / "xdg" / "exo-megatron" / "data"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache.default_cache() == tmp_path / ".cache" / "exo-megatron" / "data"
