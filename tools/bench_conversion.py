#!/usr/bin/env python
"""Time and memory of HF -> distributed -> HF, against a plain copy of the same files in the same
run.

Makes a random Llama-shaped bf16 checkpoint of the wanted size in several shards, written 32 MB at a
time. Each round then does, one after the other:

    copy     shutil.copyfile and fsync of every safetensors file, in this already running process
    import   tools/convert_hf_to_megatron.py
    export   tools/convert_megatron_to_hf.py

Before each of them everything is flushed to the disk, its input is dropped from the page cache (so
that all three read cold files), and --settle seconds pass. The pause matters in a virtual machine
that gives free memory back to its host within seconds: recently freed pages are several times
faster to write to than others, and a copy that begins at once would find them, while a conversion,
which first starts Python, would not. All three end with their output flushed to the disk. The time
of a conversion is that of a new program, from the start of Python (or torchrun) to its end. The
time of the start alone is shown by the conversion of a tiny model (rows "start of ..."). The
exported tensors are compared with the originals byte by byte.

Peak RSS is the kernel's value (ru_maxrss) for the largest process of a conversion; mapped file
pages count. Ratios are of a conversion's throughput to that of the same round's copy. Needs three
times the size of the checkpoint below --directory and leaves nothing there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

TOOLS = Path(__file__).resolve().parent
CHUNK = 32 * 2**20
MODELS = ((64, 1_000), (512, 32_000), (1024, 32_000), (2048, 128_256), (3072, 128_256), (4096, 128_256))
"""Hidden size and vocabulary of the models that are made."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """One run of one side."""

    what: str
    processes: int
    round: int
    seconds: float
    cpu_seconds: float
    megabytes_per_second: float
    ratio_to_copy: float
    peak_rss_mib: float


@dataclass(frozen=True)
class Checkpoint:
    """A random HF checkpoint on the disk."""

    path: Path
    parameters: int
    largest_tensor: int
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size of the safetensors files, in bytes."""
        return sum(file.stat().st_size for file in self.files)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the arguments say, and return 0 if every exported tensor is the original bit
    for bit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=3e9, help="size of the model (default: 3e9)")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to work, in a directory of its own")
    parser.add_argument("--shard-bytes", type=float, default=2e9, help="size of the safetensors files (default: 2e9)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=2, help="how often everything is measured (default: 2)")
    parser.add_argument("--settle", type=float, default=10, help="seconds of rest before each (default: 10)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args(argv)
    place = Path(tempfile.mkdtemp(prefix="bench-conversion-", dir=arguments.directory.resolve()))
    try:
        bench = Bench(place, arguments.parameters, int(arguments.shard_bytes), arguments.settle)
        for number in range(1, arguments.rounds + 1):
            for processes in arguments.processes:
                bench.round(number, processes)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(bench.report(), indent=2) + "\n")
        print(bench.table())
    finally:
        shutil.rmtree(place)
    return 0 if bench.identical else 1


class Bench:
    """A large and a tiny checkpoint, and the measurements made with them."""

    def __init__(self, place: Path, parameters: float, shard_bytes: int, settle: float) -> None:
        self.place = place
        self.settle = settle
        self.tiny = make_checkpoint(place / "tiny", 1e5, shard_bytes)
        self.hf = make_checkpoint(place / "hf", parameters, shard_bytes)
        self.measured: list[Measurement] = []
        self.identical = True

    def round(self, number: int, processes: int) -> None:
        """Copy, import, export and compare once; then the tiny model."""
        self._settle(self.hf.path)
        start, cpu = time.perf_counter(), time.process_time()
        (self.place / "copied").mkdir()
        for file in self.hf.files:
            copy_flushed(file, self.place / "copied" / file.name)
        copied_in, cpu = time.perf_counter() - start, time.process_time() - cpu
        shutil.rmtree(self.place / "copied")
        self._record("copy", 1, number, copied_in, copied_in, cpu, 0.0)
        self._there_and_back(self.hf, "", processes, number, copied_in)
        self._there_and_back(self.tiny, "start of ", processes, number, copied_in)

    def report(self) -> dict[str, object]:
        """Return all figures, for a JSON file."""
        return {
            "parameters": self.hf.parameters,
            "bytes": self.hf.bytes,
            "files": len(self.hf.files),
            "largest_tensor_bytes": self.hf.largest_tensor,
            "bit_identical": self.identical,
            "cpus": len(os.sched_getaffinity(0)),
            "measurements": [asdict(item) for item in self.measured],
        }

    def table(self) -> str:
        """Format the medians over the rounds as a table."""
        gigabytes, largest = self.hf.bytes / 1e9, self.hf.largest_tensor / 2**20
        lines = [
            f"{self.hf.parameters / 1e9:.2f}e9 parameters, {gigabytes:.2f} GB in {len(self.hf.files)} files, "
            f"largest tensor {largest:.0f} MiB, exported tensors {'identical' if self.identical else 'DIFFERENT'}",
            f"{'':<16} {'processes':>9} {'seconds':>8} {'CPU s':>7} {'MB/s':>7} {'ratio to copy':>18} {'peak MiB':>9}",
        ]
        for what, processes in dict.fromkeys((item.what, item.processes) for item in self.measured):
            runs = [item for item in self.measured if (item.what, item.processes) == (what, processes)]
            ratios = [item.ratio_to_copy for item in runs]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            small = what.startswith("start")
            lines.append(
                f"{what:<16} {processes:>9} {statistics.median(item.seconds for item in runs):>8.1f} "
                f"{statistics.median(item.cpu_seconds for item in runs):>7.1f} "
                f"{'' if small else f'{statistics.median(item.megabytes_per_second for item in runs):.0f}':>7} "
                f"{'' if small else spread:>18} {max(item.peak_rss_mib for item in runs):>9.0f}"
            )
        return "\n".join(lines)

    def _there_and_back(self, hf: Checkpoint, prefix: str, processes: int, number: int, copied_in: float) -> None:
        checkpoint, exported = self.place / "checkpoint", self.place / "exported"
        for what, program, source, target in (
            ("import", "convert_hf_to_megatron.py", ("--hf", hf.path), checkpoint),
            ("export", "convert_megatron_to_hf.py", ("--checkpoint", checkpoint), exported),
        ):
            self._settle(source[1])
            command = [TOOLS / program, *source, "--output", target]
            seconds, cpu, peak = run_program([str(word) for word in command], processes)
            self._record(f"{prefix}{what}", processes, number, seconds, copied_in, cpu, peak)
        different = list(differences(hf.path, exported))
        self.identical &= not different
        if different:
            print(f"{len(different)} tensors differ: {', '.join(different[:3])}", flush=True)
        shutil.rmtree(checkpoint)
        shutil.rmtree(exported)

    def _settle(self, source: Path) -> None:
        for file in source.rglob("*"):
            if file.is_file():
                drop_from_cache(file)
        os.sync()
        time.sleep(self.settle)

    def _record(
        self, what: str, processes: int, number: int, seconds: float, copied_in: float, cpu: float, peak: float
    ) -> None:
        speed = self.hf.bytes / 1e6 / seconds
        self.measured.append(Measurement(what, processes, number, seconds, cpu, speed, copied_in / seconds, peak))
        print(
            f"round {number}: {what}, {processes} processes: {seconds:.1f} s, CPU {cpu:.1f} s, {peak:.0f} MiB",
            flush=True,
        )


def run_program(command: list[str], processes: int) -> tuple[float, float, float]:
    """Run one of our programs to its end, and return seconds, CPU seconds, and MiB of its
    largest process.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def copy_flushed(source: Path, target: Path) -> None:
    """Copy a file; the copy is on the disk when the function returns."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def drop_from_cache(path: Path) -> None:
    """Flush a file and drop its pages from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_checkpoint(directory: Path, parameters: float, shard_bytes: int) -> Checkpoint:
    """Write a random Llama of at least this size, shaped as Llama 3.2: grouped-query heads, tied
    embeddings.
    """
    hidden, vocabulary = next(
        (pair for pair in reversed(MODELS) if (parameters - pair[0] * pair[1]) / _layer_size(pair[0]) >= 16), MODELS[0]
    )
    layers = max(1, math.ceil((parameters - hidden * vocabulary) / _layer_size(hidden)))
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _ffn(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    words = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(words))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    shapes = _shapes(hidden, layers, vocabulary)
    files = _write_shards(directory, shapes, shard_bytes)
    sizes = [math.prod(shape) for shape in shapes.values()]
    return Checkpoint(directory, sum(sizes), 2 * max(sizes), tuple(files))


def differences(original: Path, exported: Path) -> Iterator[str]:
    """Yield the names of tensors whose dtype, shape or bytes differ, read without the
    converter's code.
    """
    before, after = tensor_places(original), tensor_places(exported)
    yield from sorted(before.keys() ^ after.keys())
    for name in sorted(before.keys() & after.keys()):
        if before[name][1:] != after[name][1:] or not _same_bytes(before[name], after[name]):
            yield name


Place = tuple[tuple[Path, int], int, str, Shape]
"""Place of a tensor: file and offset; bytes; dtype; shape."""


def tensor_places(directory: Path) -> dict[str, Place]:
    """Find the places of the tensors of a directory of safetensors files."""
    places: dict[str, Place] = {}
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fields = json.loads(file.read(length))
        fields.pop("__metadata__", None)
        for name, field in fields.items():
            start, end = field["data_offsets"]
            places[name] = ((path, 8 + length + start), end - start, field["dtype"], tuple(field["shape"]))
    return places


def _same_bytes(one: Place, other: Place) -> bool:
    with open(one[0][0], "rb") as first, open(other[0][0], "rb") as second:
        first.seek(one[0][1])
        second.seek(other[0][1])
        for start in range(0, one[1], CHUNK):
            size = min(CHUNK, one[1] - start)
            if first.read(size) != second.read(size):
                return False
    return True


def _ffn(hidden: int) -> int:
    return hidden * 8 // 3 // 256 * 256 or 256


def _layer_size(hidden: int) -> int:
    return sum(math.prod(shape) for shape in _layer(hidden).values())


def _layer(hidden: int) -> dict[str, Shape]:
    keys = max(1, hidden // 256) * 64
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (_ffn(hidden), hidden),
        "mlp.up_proj": (_ffn(hidden), hidden),
        "mlp.down_proj": (hidden, _ffn(hidden)),
    }


def _shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _layer(hidden).items()}
    return {**shapes, "model.norm.weight": (hidden,)}


def _write_shards(directory: Path, shapes: Mapping[str, Shape], limit: int) -> list[Path]:
    groups: list[dict[str, Shape]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if groups[-1] and used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    generator = np.random.default_rng(0)
    for name, group in zip(names, groups, strict=True):
        _write_random(directory / name, group, generator)
    return [directory / name for name in names]


def _write_random(path: Path, shapes: Mapping[str, Shape], generator: np.random.Generator) -> None:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        fields[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, end, CHUNK):
            values = generator.integers(2**16, size=min(CHUNK, end - start) // 2, dtype=np.uint16)
            # Sign and mantissa are random, the exponent stays between 2^-7 and 1.
            file.write(((values & 0x83FF) | 0x3C00).tobytes())
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
