from __future__ import annotations

import json
import subprocess
import sys

from exo_megatron.utils.metrics import MetricsWriter


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def write(directory, steps, value, *, tensorboard=False, enabled=True):
    directory.mkdir(exist_ok=True)
    writer = MetricsWriter(directory, tensorboard=tensorboard, enabled=enabled)
    for step in steps:
        writer.write(step, {"loss": value, "rewards/margins": 2})
    writer.close()


def test_records(tmp_path):
    write(tmp_path / "out", [1, 2], 0.5)
    assert records(tmp_path / "out") == [{"step": step, "loss": 0.5, "rewards/margins": 2.0} for step in (1, 2)]


def test_a_record_is_in_the_file_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, enabled=True)
    writer.write(1, {"loss": 1.0})
    assert len(records(tmp_path)) == 1
    writer.close()


def test_resuming_drops_later_records_and_a_cut_line(tmp_path):
    write(tmp_path, range(1, 6), 0.5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("null\n{'no json'\n" + '{"step": 2, "lo')
    write(tmp_path, [4, 5], 0.25)
    assert [(each["step"], each["loss"]) for each in records(tmp_path)] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.5),
        (4, 0.25),
        (5, 0.25),
    ]


def test_nothing_is_dropped_before_the_first_record(tmp_path):
    write(tmp_path, [1, 2], 0.5)
    MetricsWriter(tmp_path, tensorboard=False, enabled=True).close()
    assert len(records(tmp_path)) == 2


def test_values_that_json_does_not_know(tmp_path):
    write(tmp_path, [1], float("nan"))
    assert records(tmp_path) == [{"step": 1, "loss": None, "rewards/margins": 2.0}]


def test_disabled_writes_nothing(tmp_path):
    write(tmp_path / "out", [1], 0.5, tensorboard=True, enabled=False)
    assert not list((tmp_path / "out").iterdir())


def test_importing_brings_neither_torch_nor_tensorboard():
    code = "import sys, exo_megatron.utils.metrics; print('torch' in sys.modules, 'tensorboard' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


def test_tensorboard_events_of_a_resumed_run(tmp_path):
    write(tmp_path, [1, 2, 3], 0.5, tensorboard=True)
    write(tmp_path, [3, 4], 0.25, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "rewards/margins"}
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]
