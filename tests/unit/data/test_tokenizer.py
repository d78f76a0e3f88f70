"""Tokenizers: prompt and completion meet without a space lost or gained, one EOS, no BOS in the middle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from exo_megatron.data.text import Chat
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import DataError
from tests.unit.data.tokenizers_made_here import CHAT_TEMPLATE, hf_directory, sentencepiece_model

JOINS = [
    ("The movie", " was good ."),
    ("The mov", "ie was good"),
    ("The movie ", "was good"),
    ("The movie was", "  really good"),
    ("It is good", "ness itself ."),
]
SPM_VARIANTS = {
    "default": {},
    "unigram": {"model_type": "unigram"},
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no dummy prefix": {"add_dummy_prefix": False},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {
        f"spm {name}": load_tokenizer(sentencepiece_model(root / name / "tokenizer.model", **options))
        for name, options in SPM_VARIANTS.items()
    }
    for kind in ("bytes", "metaspace", "prepend"):
        made[f"hf {kind}"] = load_tokenizer(hf_directory(root / kind, kind))
    converted = root / "converted"
    converted.mkdir()
    shutil.copy(root / "default" / "tokenizer.model", converted)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (converted / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    made["hf llama"] = load_tokenizer(converted)
    return made


NAMES = [*(f"spm {name}" for name in SPM_VARIANTS), "hf bytes", "hf metaspace", "hf prepend", "hf llama"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prompt", "completion"), JOINS)
def test_prompt_and_completion_decode_jointly(
    tokenizers: dict[str, Tokenizer], name: str, prompt: str, completion: str
) -> None:
    tokenizer = tokenizers[name]
    prompt_ids, completion_ids = tokenizer.encode_prompt(prompt), tokenizer.encode_completion(completion, prompt=prompt)
    assert tokenizer.decode(prompt_ids + completion_ids) == prompt + completion
    assert tokenizer.decode_completion(completion_ids) == completion
    assert prompt_ids[0] == 1 and 1 not in prompt_ids[1:]
    assert completion_ids.count(tokenizer.eos_id) == 1 and completion_ids[-1] == tokenizer.eos_id == 2
    assert 1 not in completion_ids
    assert tokenizer.encode_completion(completion, prompt=prompt, ended=False) == completion_ids[:-1]


def test_words_keep_the_pieces_that_the_model_was_trained_with(spm: Tokenizer, spm_file: Path) -> None:
    """' was good' after a prompt has the very ids that 'was good' has at the beginning of a text."""
    plain = SentencePieceProcessor(model_file=str(spm_file))
    assert spm.encode_completion(" was good", prompt="The movie", ended=False) == plain.encode("was good")
    assert spm.encode_prompt("The movie") == [plain.bos_id(), *plain.encode("The movie")]
    joined = spm.encode_prompt("The movie") + spm.encode_completion(" was good", prompt="The movie", ended=False)
    assert joined == [plain.bos_id(), *plain.encode("The movie was good")]


def test_hf_ids_are_those_of_hf(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path, "bytes")
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(str(directory))
    assert ours.encode_prompt("The movie was good") == theirs.encode("The movie was good")
    assert ours.vocab_size == len(theirs)


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path, "bytes")
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode_prompt("The movie was really great .")) == "The movie was really great ."


def test_text_that_brings_its_special_tokens_does_not_get_them_twice(chat: Tokenizer) -> None:
    assert chat.encode_prompt("<s>The movie") == chat.encode_prompt("The movie")
    assert chat.encode_completion(" was good</s>", prompt="x") == chat.encode_completion(" was good", prompt="x")


def test_control_symbols_in_text_are_text_for_sentencepiece(spm: Tokenizer) -> None:
    ids = spm.encode_completion(" good</s> bad", prompt="x")
    assert ids.count(spm.eos_id) == 1
    assert spm.decode_completion(ids) == " good</s> bad"


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    no_bos = load_tokenizer(sentencepiece_model(tmp_path / "a.model", bos_id=-1))
    assert no_bos.decode(no_bos.encode_prompt("The movie")[:1]) != ""
    directory = hf_directory(tmp_path / "hf", "bytes")
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    assert 1 not in load_tokenizer(directory).encode_prompt("The movie")


ASKED = Chat(({"role": "user", "content": "The movie?"},))
GOOD = ({"role": "assistant", "content": "It was good"},)


class TestChat:
    def test_prompt_is_rendered_with_the_generation_prompt(self, chat: Tokenizer) -> None:
        asked = Chat(({"role": "system", "content": "Be kind."}, *ASKED.messages))
        assert chat.prompt_text(asked) == "<|system|>Be kind.</s>\n<|user|>The movie?</s>\n<|assistant|>"
        ids = chat.encode_prompt(asked)
        assert ids[-1] == 4 and 1 not in ids  # ends with <|assistant|>; this template writes no BOS
        assert chat.decode(ids) == "Be kind.\nThe movie?\n"

    def test_completion_is_the_answer_and_its_end(self, chat: Tokenizer) -> None:
        ids = chat.encode_completion(GOOD, prompt=ASKED)
        assert chat.decode_completion(ids) == "It was good"
        assert ids[-1] == chat.eos_id and ids.count(chat.eos_id) == 1
        assert chat.encode_completion(GOOD, prompt=ASKED, ended=False) == ids[:-1]

    def test_end_of_sequence_is_added_where_the_template_writes_none(self, tmp_path: Path) -> None:
        template = CHAT_TEMPLATE.replace("</s>", "")
        tokenizer = load_tokenizer(hf_directory(tmp_path, "bytes", chat_template=template))
        ids = tokenizer.encode_completion(GOOD, prompt=ASKED)
        assert tokenizer.decode_completion(ids) == "It was good\n" and ids[-1] == tokenizer.eos_id

    def test_errors(self, spm: Tokenizer, chat: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no chat template"):
            spm.encode_prompt(ASKED)
        bare = load_tokenizer(hf_directory(tmp_path / "bare", "bytes", chat_template=None))
        with pytest.raises(DataError, match=r"no chat template.*fix: set data.chat_template"):
            bare.encode_prompt(ASKED)
        with pytest.raises(DataError, match=r"refuses the messages.*unknown role critic"):
            chat.encode_prompt(Chat(({"role": "critic", "content": "x"},)))
        reversing = load_tokenizer(
            hf_directory(tmp_path / "odd", "bytes", chat_template="{{ messages[-1]['content'] }}: answer")
        )
        with pytest.raises(DataError, match="the answer is no continuation of its prompt"):
            reversing.encode_completion(GOOD, prompt=ASKED)


class TestLoading:
    def test_directory_with_a_lone_model(self, spm: Tokenizer, spm_file: Path, tmp_path: Path) -> None:
        shutil.copy(spm_file, tmp_path / "tokenizer.model")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode_prompt("The movie") == spm.encode_prompt("The movie")
        assert tokenizer.path == tmp_path

    def test_unigram_model_under_the_name_of_llama_is_refused(self, tmp_path: Path) -> None:
        """transformers 5 would load it as BPE and split every word into characters."""
        sentencepiece_model(tmp_path / "tokenizer.model", model_type="unigram")
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match=r"gives other ids than tokenizer\.model itself"):
            load_tokenizer(tmp_path)

    def test_no_end_of_sequence(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no end-of-sequence token"):
            load_tokenizer(sentencepiece_model(tmp_path / "a.model", eos_id=-1))
        with pytest.raises(DataError, match="no end-of-sequence token"):
            load_tokenizer(hf_directory(tmp_path / "hf", "bytes", eos_token=None))

    def test_nothing_to_load(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is not a tokenizer"):
            load_tokenizer(tmp_path / "absent")
        with pytest.raises(DataError, match="cannot load the tokenizer"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(DataError, match="cannot load the tokenizer"):
            load_tokenizer(tmp_path)
        (tmp_path / "bad.model").write_bytes(b"not a model")
        with pytest.raises(DataError, match="is not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")

    def test_code_of_the_directory_is_not_run(self, tmp_path: Path) -> None:
        hf_directory(tmp_path, "bytes", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        with pytest.raises(DataError, match="cannot load the tokenizer"):
            load_tokenizer(tmp_path)
        assert not (tmp_path / "ran").exists()


def test_a_model_with_fewer_rows_than_text_needs(spm: Tokenizer) -> None:
    assert spm.fitted_to(spm.vocab_size).vocab_size == spm.vocab_size
    assert spm.fitted_to(spm.vocab_size + 3).vocab_size == spm.vocab_size
    with pytest.raises(DataError, match=rf"{spm.vocab_size} entries, the model {spm.vocab_size - 1} embedding rows"):
        spm.fitted_to(spm.vocab_size - 1)
    assert max(spm.encode_prompt("The movie é 漢")) < spm.vocab_size
