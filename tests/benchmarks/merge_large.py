"""`lightning-lora merge` on a generated model folder: time against copying the same files, peak memory, right values.

    python tests/benchmarks/run.py large --gigabytes 8 --folder /somewhere/with/space

Every weight matrix but the embeddings has an adapter of rank 16. Copying and merging end with the data on disk (fsync);
merging runs as a program of its own, which reports its peak private memory, without pages of files (Linux). Everything
is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import table
from safetensors import safe_open
from safetensors.torch import save_file

RANK, ALPHA, VOCABULARY = 16, 32, 32_000
SHARD = 2 * 10**9
HEADER = "| base | merge | copy | peak private memory | elements checked in float64 | not the nearest |"
Shapes = dict[str, tuple[int, int]]


def layer_shapes(width: int, layer: int) -> Shapes:
    """The matrices of one Llama layer."""
    inner = int(width * 2.6875)
    attention = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {f"model.layers.{layer}.{name}": shape for name, shape in (attention | mlp).items()}


def generate(folder: Path, gigabytes: float, width: int, vocabulary: int) -> Shapes:
    """Write base and adapter, a tensor of one shard in memory at a time; returns the adapted matrices."""
    base = folder / "base"
    base.mkdir(parents=True)
    adapted: Shapes = {}
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    total, number = 0, 0

    def flush() -> None:
        nonlocal number
        if not shard:
            return
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(shard, base / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    def add(name: str, tensor: torch.Tensor) -> None:
        nonlocal total
        shard[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in shard.values()) > min(SHARD, gigabytes * 1e9 / 4):
            flush()

    add("model.embed_tokens.weight", torch.randn(vocabulary, width).bfloat16())
    layer = 0
    while total < gigabytes * 1e9 - 2 * vocabulary * width:
        for name, shape in layer_shapes(width, layer).items():
            adapted[name] = shape
            add(f"{name}.weight", torch.randn(shape, dtype=torch.float32).mul_(0.02).bfloat16())
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{layer}.{norm}.weight", torch.ones(width, dtype=torch.bfloat16))
        layer += 1
    add("model.norm.weight", torch.ones(width, dtype=torch.bfloat16))
    add("lm_head.weight", torch.randn(vocabulary, width).bfloat16())
    flush()
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (base / "config.json").write_text(json.dumps(llama_config(width, layer, vocabulary)))
    write_adapter(folder / "adapter", adapted)
    return adapted


def llama_config(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": int(width * 2.6875),
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 128),
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_adapter(path: Path, adapted: Shapes) -> None:
    """As peft writes it."""
    path.mkdir()
    tensors = {}
    for name, (outs, ins) in adapted.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, ins) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outs, RANK) * 0.02
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in adapted})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))


def copy(source: Path, target: Path) -> float:
    """Seconds for copying a folder until it is on disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


# Pages of a mapped file are the system's, which takes them back when others need them.
PROGRAM = """
import sys, threading

def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def look(peak, ended):
    while not ended.wait(0.005):
        peak[0] = max(peak[0], private())

peak, ended = [0], threading.Event()
looking = threading.Thread(target=look, args=(peak, ended))
looking.start()
from lightning_lora.command.main import main
status = main(sys.argv[1:]) if sys.argv[1:] else 0
ended.set()
looking.join()
print(max(peak[0], private()), file=sys.stderr)
sys.exit(status)
"""


@dataclass
class Run:
    """Seconds and peak private bytes."""

    seconds: float
    peak: int


def merge(folder: Path) -> Run:
    """One merge as the command does it."""
    return command("merge", "--base", folder / "base", "--adapter", folder / "adapter", "--output", folder / "out")


def command(*args: object) -> Run:
    """Run the lightning-lora command as a program of its own; without arguments, only its imports."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, args)], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if run.returncode:
        raise RuntimeError(run.stderr)
    return Run(seconds, int(run.stderr.split()[-1]) * 1024)


def check_samples(folder: Path, adapted: Shapes, rows: int) -> dict[str, float]:
    """Compare some rows of every tensor with float64, read and computed without this package."""
    draw = random.Random(1)
    elements = wrong = 0
    worst = 0.0
    for name, before, after in _tensors(folder):
        picked = [draw.randrange(before.get_shape()[0]) for _ in range(rows)]
        for row in picked:
            old, new = before[row : row + 1].double(), after[row : row + 1]
            module = name.removesuffix(".weight")
            if module in adapted:
                a, b = _factors(folder, module)
                old = old + (b[row : row + 1] @ a) * (ALPHA / RANK)
            nearest = old.to(new.dtype)
            elements += new.numel()
            wrong += int((nearest != new).sum())
            # in units of the last place of the exact value
            unit = torch.exp2(torch.floor(torch.log2(old.abs().clamp_min(2.0**-120))) - 7)
            worst = max(worst, float(((new.double() - old).abs() / unit).max()))
    return {"elements": elements, "not_nearest": wrong, "worst_in_last_places": worst}


def _tensors(folder: Path) -> Iterator[tuple[str, Any, Any]]:
    for file in sorted((folder / "base").glob("*.safetensors")):
        with safe_open(file, "pt") as before, safe_open(folder / "out" / file.name, "pt") as after:
            if list(before.keys()) != list(after.keys()):
                raise RuntimeError(f"{file.name}: other names")
            for name in before.keys():  # noqa: SIM118
                yield name, before.get_slice(name), after.get_slice(name)


def _factors(folder: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        a, b = (file.get_tensor(f"base_model.model.{module}.lora_{leaf}.weight") for leaf in "AB")
    return a.double(), b.double()


def measure(folder: Path, gigabytes: float, width: int = 4096, vocabulary: int = VOCABULARY, rounds: int = 2) -> Any:
    """Generate, copy and merge in turns, check; returns the figures."""
    torch.manual_seed(0)
    adapted = generate(folder, gigabytes, width, vocabulary)
    size = sum(file.stat().st_size for file in (folder / "base").iterdir())
    copies, merges = [], []
    for _ in range(rounds):
        copies.append(copy(folder / "base", folder / "copy"))
        shutil.rmtree(folder / "out", ignore_errors=True)
        merges.append(merge(folder))
    imports = min(command().peak for _ in range(rounds))
    return {
        "base_bytes": size,
        "copy_seconds": copies,
        "merge_seconds": [run.seconds for run in merges],
        "peak_bytes": max(run.peak for run in merges),
        "peak_of_the_imports_alone": imports,
        **check_samples(folder, adapted, rows=2),
    }


def cells(found: Any) -> list[str]:
    """The cells of a base: means of the rounds."""
    merges, copies = (sum(found[f"{name}_seconds"]) / len(found[f"{name}_seconds"]) for name in ("merge", "copy"))
    imports = found["peak_of_the_imports_alone"] / 1e6
    peak = f"{found['peak_bytes'] / 1e6:.0f} MB ({imports:.0f} MB of it imports)"
    size = f"{found['base_bytes'] / 1e9:.2f} GB"
    return [size, f"{merges:.1f} s", f"{copies:.1f} s", peak, f"{found['elements']:,}", f"{found['not_nearest']:,.0f}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0, 8.0])
    parser.add_argument("--folder", type=Path, default=None, help="needs three times the size")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    table(HEADER, (row(gigabytes, options) for gigabytes in options.gigabytes))


def row(gigabytes: float, options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        return cells(measure(Path(name) / "run", gigabytes, options.width, rounds=options.rounds))


if __name__ == "__main__":
    main()
