"""Small real tokenizers, trained on the spot: SentencePiece models and Hugging Face directories."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'critic' %}{{ raise_exception('unknown role critic') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}</s>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus() -> list[str]:
    subjects = ["The movie", "The plot", "It", "This actor", "the story"]
    verbs = ["was", "is", "seemed", "felt"]
    ends = ["good", "bad", "really great", "not so dull", "awful", "goodness itself"]
    return [f"{s} {v} {e} ." for s, v, e in itertools.product(subjects, verbs, ends)] * 3


def sentencepiece_model(path: Path, **options: Any) -> Path:
    """Train a SentencePiece model into the file `path`."""
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, minloglevel=2, **settings
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def hf_directory(path: Path, kind: str, **config: Any) -> Path:
    """A tokenizer directory with tokenizer.json.

    kind: "bytes" (GPT-2 and Llama 3), "metaspace" (the space comes with the splitting), "prepend" (Llama 2 as converted
    by transformers 4: a normaliser prepends the space, a decoder strips it). config: more of tokenizer_config.json.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "prepend"))
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet: list[str] = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    stored = {name: value for name, value in settings.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(stored), encoding="utf-8")
    return path
