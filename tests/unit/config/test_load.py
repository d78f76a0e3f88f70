"""One stage: files and settings into frozen classes, and one line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from exo_megatron.config.describe import NAMES_ELSEWHERE, VALUES_ELSEWHERE, describe_keys
from exo_megatron.config.document import config_digest, dump_config
from exo_megatron.config.load import load_stage_config
from exo_megatron.config.sections import LossConfig
from exo_megatron.config.stages import STAGE_CONFIGS, AlignConfig, SftConfig, status_directory
from exo_megatron.errors import ConfigError

ALIGN = """\
output: out/align
model: {checkpoint: out/sft}
data:
  path: d.jsonl
optimizer:
  lr: 1e-6
  eps: 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "align.yaml"
    path.write_text(ALIGN, encoding="utf-8")
    return path


def error_of(stage: str, file: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_stage_config(stage, file, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def test_file_and_overrides(file):
    config = load_stage_config("align", file, ["optimizer.lr=2e-5", "loss={kind: dpo_rw, beta_pi: 2}", "candidates=4"])
    assert isinstance(config, AlignConfig)
    assert config.optimizer.lr == 2e-5
    assert config.optimizer.eps == 1.0
    assert (config.loss.kind, config.loss.beta_pi) == ("dpo_rw", 2.0)
    assert config.candidates == 4
    assert config.model.checkpoint == Path("out/sft")
    with pytest.raises(ValidationError):
        config.seed = 3


def test_later_overrides_win_and_null_is_a_value(file):
    config = load_stage_config("align", file, ["candidates=3", "candidates=null", "seed=1", "seed=2"])
    assert isinstance(config, AlignConfig)
    assert config.candidates is None
    assert config.seed == 2


def test_partial_section_keeps_the_defaults_of_the_stage():
    given = ["output=o", "model.checkpoint=m", "data.path=d", "optimizer.weight_decay=0.1"]
    config = load_stage_config("sft", None, given)
    assert isinstance(config, SftConfig)
    assert config.optimizer.lr == SftConfig.model_fields["optimizer"].default.lr == 1e-5
    assert config.optimizer.weight_decay == 0.1


def test_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_stage_config("sft", None, ["output=~/o", "model.checkpoint=~/m", "data.path=~/d.jsonl"])
    assert isinstance(config, SftConfig)
    assert (config.output, config.model.checkpoint) == (Path("/home/me/o"), Path("/home/me/m"))
    assert config.data.path == "/home/me/d.jsonl"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", ["command line: optimizer.lrr:", "unknown key 'lrr'", "fix: write optimizer.lr"]),
        ("lr=1", ["command line: lr:", "fix: write optimizer.lr"]),
        ("optimizer.lr='1e-5'", ["got '1e-5'", "number > 0", "remove the quotes"]),
        ("optimizer.lr=-1", ["got -1", "number > 0"]),
        ("optimizer.lr=0", ["got 0", "number > 0"]),
        ("optimizer.lr=.nan", ["got nan", "number > 0"]),
        ("optimizer.lr=.inf", ["got inf", "number > 0"]),
        ("optimizer.min_lr_ratio=.nan", ["got nan"]),
        ("optimizer.beta1=1", ["got 1", "< 1"]),
        ("batch.groups=1e3", ["got 1000.0", "integer > 0", "write 1000"]),
        ("batch.groups=1.5", ["got 1.5", "integer > 0"]),
        ("batch.groups=true", ["got true", "integer > 0"]),
        ("batch.groups='8'", ["got '8'", "remove the quotes"]),
        ("log.tensorboard=yes", ["got 'yes'", "true or false", "write true"]),
        ("log.tensorboard=1", ["got 1", "true or false"]),
        ("model=null", ["model: got null", "section (checkpoint)"]),
        ("model={}", ["model.checkpoint: missing", "path", "pass model.checkpoint=VALUE"]),
        ("loss.kind=exo_rv", ["got 'exo_rv'", "exo_rw, exo_pref, dpo_rw, dpo_pref", "write exo_rw"]),
        ("loss.label_smoothing=0.5", ["got 0.5", "< 0.5"]),
        ("loss.temperature=0", ["got 0", "number > 0"]),
        ("candidates=1", ["got 1", "integer >= 2 or null"]),
        ("optimizer=[1]", ["optimizer: got [1]", "section (lr,"]),
        ("output=3", ["output: got 3", "path", "put it in quotes"]),
        ("data.path=''", ["got ''", "non-empty text"]),
        ("seed=-1", ["got -1", "integer >= 0"]),
        ("output.x=3", ["output is 'out/align', not a section"]),
        ("modle.checkpoint=x", ["command line: modle: unknown key 'modle'", "write model"]),
        ("=3", ["got '=3'", "key.path=value"]),
        ("a..b=3", ["got 'a..b=3'"]),
        ("lr", ["got 'lr'", "key.path=value"]),
        ("save.interval=[", ["command line: save.interval", "expected YAML"]),
        ("optimizer={lr: 1, lr: 2}", ["optimizer", "stands twice"]),
    ],
)
def test_mistakes(file, override, words):
    text = error_of("align", file, override)
    assert all(word in text for word in words), text
    assert "expected" in text
    assert "fix: " in text


def test_mistakes_in_the_file_name_file_and_line(file):
    file.write_text(ALIGN.replace("eps: 1", "esp: 1"), encoding="utf-8")
    assert error_of("align", file).startswith(f"{file}:7: optimizer.esp: unknown key 'esp'")
    file.write_text(ALIGN.replace("1e-6", "-1e-6"), encoding="utf-8")
    assert error_of("align", file).startswith(f"{file}:6: optimizer.lr: got -1e-06;")


def test_unknown_key_is_told_before_the_missing_one_it_stands_for(file):
    file.write_text(ALIGN.replace("model:", "modle:"), encoding="utf-8")
    text = error_of("align", file)
    assert "unknown key 'modle' (and 1 more)" in text


def test_unknown_stage():
    assert "fix: write rollout" in error_of("rolout", None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["save.interval=20", "batch.max_steps=10"], ["save.interval: got 20", "10 steps"]),
        (["optimizer.warmup_steps=20", "batch.max_steps=10"], ["optimizer.warmup_steps: got 20"]),
        (["optimizer.schedule=constant", "optimizer.min_lr_ratio=0.1"], ["min_lr_ratio", "no effect"]),
        (["save.all_steps=true"], ["save.all_steps", "set save.interval"]),
        (["save.all_steps=true", "save.interval=5", "save.keep=3"], ["save.keep", "no effect"]),
        (["loss.kind=exo_pref", "candidates=4"], ["candidates: got 4", "2 or null", "set pairs=best_and_worst"]),
        (["pairs=best_and_worst"], ["pairs: got 'best_and_worst'", "no effect: loss.kind exo_rw compares rewards"]),
        (["loss.kind=dpo_rw", "ties=skip"], ["ties: got 'skip'", "no effect: loss.kind dpo_rw compares rewards"]),
        (["loss.kind=dpo_pref", "loss.beta_r=0.3"], ["loss.beta_r", "no effect"]),
        (["loss.kind=dpo_pref", "loss.label_smoothing=0.01"], ["loss.label_smoothing", "no effect"]),
        (["output=out/sft"], ["output: got 'out/sft', which is also model.checkpoint"]),
        (["data.path=out/align/"], ["which is also data.path"]),
        (["data.path=out/align/candidates"], ["output: got 'out/align', which holds data.path"]),
    ],
)
def test_contradictions_of_align(file, overrides, words):
    text = error_of("align", file, *overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "overrides",
    [
        ["save.interval=10", "batch.max_steps=10"],
        ["optimizer.schedule=cosine", "optimizer.min_lr_ratio=0.1"],
        ["save.all_steps=true", "save.interval=5"],
        ["loss.kind=exo_pref", "candidates=2", "loss.label_smoothing=0.01"],
        ["loss.kind=dpo_rw", "loss.beta_r=0.3", "candidates=8"],
        ["loss.kind=ipo_pref", "pairs=best_and_worst", "candidates=8", "ties=skip"],
        ["loss.kind=exo_pref", "pairs=two_draws", "ties=skip"],
        ["loss.function=my:loss", "pairs=best_and_worst", "candidates=8", "ties=skip"],
    ],
)
def test_what_the_contradictions_leave_allowed(file, overrides):
    load_stage_config("align", file, overrides)


SCORE = ["output=o", "candidates=c"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.kind=function"], ["reward.function: missing", "package.module:name"]),
        (["reward.function=a:b", "data.path=x"], ["data.path: unknown key", "columns, transcript", "write candidates"]),
        (["reward.function=module.name"], ["got 'module.name'", "package.module:name"]),
        (["reward.function=a:b:c"], ["got 'a:b:c'"]),
        (["reward.function=a.1b:c"], ["got 'a.1b:c'"]),
        (["reward.function=a:b", "reward.path=x"], ["reward.path", "no effect"]),
        (["reward.function=a:b", "reward.label=1"], ["reward.label", "no effect"]),
        (["reward.kind=hf_classifier"], ["reward.path: missing", "classifier"]),
        (["reward.kind=hf_classifier", "reward.path=x", "reward.function=a:b"], ["reward.function", "no effect"]),
    ],
)
def test_contradictions_of_rewards(overrides, words):
    text = error_of("score", None, *SCORE, *overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("output", ["/", "//", "/x/.."])
def test_an_output_needs_a_name(output):
    for stage, words in (("export", ["model.checkpoint=m"]), ("import", ["hf=h"])):
        with pytest.raises(ConfigError, match=r"output: got '/.*'; expected a directory with a name"):
            load_stage_config(stage, None, [f"output={output}", *words])


def test_an_export_keeps_its_files_beside_its_output(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for output in (".", "../" + tmp_path.name, "x/..", str(tmp_path), f"{tmp_path}/"):
        config = load_stage_config("export", None, [f"output={output}", "model.checkpoint=m"])
        assert status_directory(config) == tmp_path.parent / f".{tmp_path.name}.exo-megatron"


def test_evaluate_models():
    base = ["output=o", "reference.checkpoint=r", "data.path=d", "reward.function=a:b"]
    load_stage_config("evaluate", None, [*base, "models={exo: a, dpo-1.5: b}"])
    assert "models: got {}" in error_of("evaluate", None, *base, "models={}")
    assert "the name 'a/b'" in error_of("evaluate", None, *base, "models={a/b: x}")
    assert "models.exo: got 3" in error_of("evaluate", None, *base, "models.exo=3")


@pytest.mark.parametrize(
    "overrides", [[], ["data.path=1e-6"], ["output='no'", "data.path='2024-01-01'", "model.checkpoint=é x"]]
)
def test_dumped_configuration_loads_as_equal(file, tmp_path, overrides):
    config = load_stage_config("align", file, [each.replace("=1e-6", "='1e-6'") for each in overrides])
    dump_config(config, tmp_path / "resolved.yaml")
    again = load_stage_config("align", tmp_path / "resolved.yaml", [])
    assert again == config
    assert config_digest(again) == config_digest(config)


def test_digest_depends_on_every_value_and_not_on_spelling(file, tmp_path):
    config = load_stage_config("align", file, [])
    assert config_digest(load_stage_config("align", file, ["seed=0", "optimizer.lr=0.000001"])) == config_digest(config)
    others = [["seed=1"], ["optimizer.lr=2e-6"], ["output=elsewhere"], ["log.interval=2"]]
    digests = {config_digest(load_stage_config("align", file, each)) for each in others}
    assert len(digests | {config_digest(config)}) == 5
    assert config_digest(config, {"sft": "a"}) != config_digest(config, {"sft": "b"})
    assert config_digest(config, {}) == config_digest(config)


def test_loading_imports_no_torch():
    code = (
        "import sys, exo_megatron.config.load, exo_megatron.cli.main, exo_megatron.errors;"
        "print([m for m in ('torch', 'numpy', 'transformers', 'datasets', 'megatron') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("loss.beta=0.1", "write loss.beta_pi"),
        ("optimizer.learning_rate=1e-6", "write optimizer.lr"),
        ("learning_rate=1e-6", "write optimizer.lr"),
        ("optimizer.max_grad_norm=1", "write optimizer.clip_grad"),
        ("num_train_epochs=1", "write batch.epochs"),
        ("loss.kindd=exo_rw", "write loss.kind"),
        ("lr=1e-6", "write optimizer.lr"),
        ("loss={beta: 0.1}", "write loss.beta_pi"),
        ("bf16=true", "write compute.precision"),
        ("fp16=true", "write compute.precision"),
        ("gradient_checkpointing=true", "write compute.recompute"),
        ("max_length=1024", "write data.max_prompt_tokens and data.max_completion_tokens"),
        ("gradient_accumulation_steps=8", "write batch.groups"),
        ("global_batch_size=64", "write batch.groups"),
        ("batch.train_batch_size=64", "write batch.groups"),
        ("per_device_train_batch_size=4", "write batch.groups and compute.max_tokens_per_microbatch"),
        ("micro_batch_size=4", "write batch.groups and compute.max_tokens_per_microbatch"),
        ("precompute_ref_log_probs=true", "write reference_logprobs"),
        ("ref_model=m", "write reference.checkpoint"),
        ("reference.ref_model_name_or_path=m", "write reference.checkpoint"),
        ("save_total_limit=3", "write save.keep"),
        ("frobnicate=1", "remove it"),
    ],
)
def test_names_of_other_trainers_are_known(setting: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key .*; fix: {fix}$"):
        load_stage_config("align", None, ["output=o", "model.checkpoint=m", "data.path=d", setting])


def test_names_of_other_trainers_stand_for_keys_that_exist() -> None:
    keys = {each.key for section in STAGE_CONFIGS.values() for each in describe_keys(section)}
    assert {key for meant in NAMES_ELSEWHERE.values() for key in meant.split()} <= keys
    assert not {key.split(".")[-1] for key in keys} & NAMES_ELSEWHERE.keys()


def test_digest_of_an_earlier_version_stays() -> None:
    """Printed by the version before keys were added: what it began can be resumed."""
    section = {"checkpoint": "c"}
    data = {"path": "p", "max_prompt_tokens": 1, "max_completion_tokens": 1}
    config = AlignConfig.model_validate({"output": "o", "model": section, "data": data})
    assert config_digest(config) == "8403a9881b9d66fb11928c87e9676eb27fe0fd33396ebe304a6f2db2f783404d"
    assert config.loss.digest_json() == (
        '{"kind":"exo_rw","beta_pi":0.5,"beta_r":0.1,"label_smoothing":0.001,"temperature":0.8}'
    )
    for changed in ({"nll_weight": 0.1}, {"function": "m:f"}):
        other = config.model_copy(update={"loss": LossConfig.model_validate(changed)})
        assert config_digest(other) != config_digest(config)
        assert other.loss.digest_json() != config.loss.digest_json()
    preference = AlignConfig.model_validate(
        {"output": "o", "model": section, "data": {"path": "p"}, "loss": {"kind": "exo_pref"}}
    )
    assert config_digest(preference) == "c70a2963d0a83460ae45f486c528ea9192bddb4f379ef1434fc0cbc4820736ea"
    for option in ({"pairs": "best_and_worst"}, {"ties": "skip"}):
        assert config_digest(preference.model_copy(update=option)) != config_digest(preference)


def test_in_a_file_a_key_is_named_as_it_is_written_there(file: Path) -> None:
    file.write_text(ALIGN + "loss: {beta: 0.1}\n", encoding="utf-8")
    assert error_of("align", file).endswith("; fix: write beta_pi")
    file.write_text(ALIGN + "beta: 0.1\n", encoding="utf-8")
    assert error_of("align", file).endswith("; fix: write loss.beta_pi")


@pytest.mark.parametrize(
    ("key", "value", "ours"), [(k, *pair) for k, v in VALUES_ELSEWHERE.items() for pair in v.items()]
)
def test_values_of_other_trainers_are_known(file: Path, key: str, value: str, ours: str) -> None:
    assert error_of("align", file, f"{key}={value}").endswith(f"; fix: write {ours}")
    load_stage_config("align", file, [f"{key}={ours}"])


def test_the_losses_of_other_trainers_are_known() -> None:
    known = VALUES_ELSEWHERE["loss.kind"]
    assert known == {
        "sigmoid": "dpo_pref",
        "dpo": "dpo_pref",
        "ipo": "ipo_pref",
        "exo_pair": "exo_pref",
        "exo": "exo_rw",
    }


def test_all_missing_keys_are_named() -> None:
    assert "command line: output: missing, as are model.checkpoint and data.path; expected" in error_of(
        "align", None, "model={}", "data={}"
    )
    assert "command line: output: missing, as are model and data; expected" in error_of("align", None)
    assert "output: missing, as is model; expected" in error_of("align", None, "data.path=d")
    assert "output: missing (and 1 more); expected" in error_of(
        "align", None, "model.checkpoint=m", "data.path=d", "seed=-1"
    )


def test_only_sft_trains_on_conversations(file: Path) -> None:
    text = error_of("align", file, "data.train_on=all")
    assert text.startswith("command line: data.train_on: got 'all', which has no effect: only sft trains on")


def test_a_function_beside_another_kind_of_loss(file: Path) -> None:
    text = error_of("align", file, "loss.kind=exo_rw", "loss.function=my:loss")
    assert text.startswith("command line: loss.function: got 'my:loss', which has no effect: loss.kind is exo_rw;")
    assert text.endswith("; fix: set loss.kind=function, or remove loss.function")
    load_stage_config("align", file, ["loss.kind=function", "loss.function=my:loss"])
    load_stage_config("align", file, ["loss.function=my:loss"])
