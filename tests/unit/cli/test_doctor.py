"""What doctor says about packages that are there, missing, broken, or not what their name says."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from exo_megatron.cli import doctor as command
from exo_megatron.cli.main import main
from exo_megatron.parallel import doctor
from exo_megatron.parallel.doctor import ESSENTIALS, Finding

ROOT = Path(__file__).parents[3]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes packages out of (path, content) that are found before the installed ones, here and in new processes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(**files: str) -> None:
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(content)
        importlib.invalidate_caches()

    yield make
    for name in ("apex", "amp_C"):
        sys.modules.pop(name, None)


def part(name: str) -> Finding:
    checks = {"NVIDIA apex": doctor._check_apex, "Transformer Engine": doctor._check_transformer_engine}
    return checks[name]()


def test_essentials_are_those_of_setup():
    wanted = dict(re.findall(r'^    "([A-Za-z-]+)([<>=][^"]*)",', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert {name: wants for name, (_, wants) in ESSENTIALS.items()} == {
        name: wants for name, wants in wanted.items() if name in ESSENTIALS
    }
    assert set(ESSENTIALS) - set(wanted) == set()


def test_apex_of_the_index_is_not_nvidias(packages):
    (Path(sys.path[0]) / "apex").mkdir()
    packages(apex__init="x = 1")
    (Path(sys.path[0]) / "apex" / "init.py").rename(Path(sys.path[0]) / "apex" / "__init__.py")
    found = part("NVIDIA apex")
    assert found.state == "missing"
    assert "not NVIDIA's" in found.detail
    assert "github.com/NVIDIA/apex" in found.advice


def test_apex_without_extensions(packages):
    root = Path(sys.path[0])
    (root / "apex" / "optimizers").mkdir(parents=True)
    (root / "apex" / "__init__.py").write_text("")
    assert "without its CUDA extensions" in part("NVIDIA apex").detail


def test_no_apex():
    assert importlib.util.find_spec("apex") is None
    assert (part("NVIDIA apex").state, part("NVIDIA apex").detail[:13]) == ("missing", "not installed")


def test_a_part_that_cannot_be_imported_is_broken_and_says_why(packages):
    packages(transformer_engine="raise ImportError('undefined symbol: x')")
    found = part("Transformer Engine")
    assert found.state == "broken"
    assert "undefined symbol: x" in found.detail
    assert "exo-megatron[cuda]" in found.advice


def test_packages():
    assert doctor._check_package("pydantic", "pydantic", ">=2.7").state == "ok"
    too_new = doctor._check_package("pydantic", "pydantic", ">=99")
    assert (too_new.state, too_new.advice) == ("broken", "pip install 'pydantic>=99'")
    assert doctor._check_package("no-such-thing", "no_such_thing", ">=1").state == "missing"
    assert doctor._check_package("pydantic", "no_such_module", ">=2").state == "broken"


@pytest.mark.parametrize(
    ("versions", "collective", "code", "last"),
    [
        ("ok", "ok", 0, "Ready: the essentials work."),
        ("broken", "ok", 1, "Not ready: datasets."),
        ("ok", "broken", 1, "Not ready: gloo."),
        ("missing", "broken", 1, "Not ready: datasets, gloo."),
    ],
)
def test_report_and_exit_code(monkeypatch, capsys, versions, collective, code, last):
    monkeypatch.setattr(command, "check_versions", lambda: [Finding("datasets", versions, "1.0", "reinstall it")])
    monkeypatch.setattr(command, "check_devices", lambda: [Finding("CUDA", "missing", "no device")])
    monkeypatch.setattr(command, "check_optional_parts", lambda: [Finding("vLLM", "missing", "not installed")])
    monkeypatch.setattr(command, "check_collectives", lambda: [Finding("gloo", collective, "0.1 s")])
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == last
    assert "-> reinstall it" in out


def test_without_torch_the_rest_is_not_tried(monkeypatch, capsys):
    monkeypatch.setattr(command, "check_versions", lambda: [Finding("torch", "missing", ">=2.6 wanted")])
    assert main(["doctor"]) == 1
    assert "not looked at without torch" in capsys.readouterr().out
