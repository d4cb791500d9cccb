"""Another adapter in the place of one: swapped in, beside peft's hotswap and beside loading anew.

    python tests/benchmarks/run.py swap --seconds 10

A network of linear layers, all adapted; the adapters are PEFT folders, read from disk at each call. `anew` takes the
adapter out and loads the other one onto the plain model: ours by unload and load_adapter, peft's by unload and
PeftModel.from_pretrained. Merged, peft's hotswap refuses, so there it is unmerged before and merged after, by addition.
From memory, ours loads what read_adapter returned once, and peft's hotswap_adapter_from_state_dict takes a state dict
that was read once, with set_adapter after it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import against, interleaved, milliseconds, ratio, table
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights
from torch import nn

from lightning_lora import load_adapter, merge, read_adapter, unload


class Layers(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))


def adapters(folder: Path, base: nn.Module, *ranks: int) -> list[str]:
    """Two folders by peft with adapters of these ranks."""
    paths = []
    for number, rank in enumerate(ranks):
        config = LoraConfig(r=rank, target_modules=r"layers\.\d+", init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(str(folder / str(number)))  # type: ignore[arg-type]
        paths.append(str(folder / str(number)))
    return paths


def in_turn(sources: list[Any]) -> Callable[[], Any]:
    turns = itertools.cycle(sources[::-1])
    return lambda: next(turns)


def in_memory(path: str) -> tuple[dict[str, torch.Tensor], Any]:
    """What peft swaps in without reading a file: a state dict by a model's names, and the options."""
    state = load_peft_weights(path, device="cpu")
    named = _insert_adapter_name_into_state_dict(state, adapter_name="default", parameter_prefix="lora_")
    return named, LoraConfig.from_pretrained(path)


def measured(base: nn.Module, paths: list[str], is_merged: bool, seconds: float) -> list[str]:
    """The cells of one row: our time, and medians of the rounds' ratios."""
    swapped, anew = copy.deepcopy(base), copy.deepcopy(base)
    their_base = copy.deepcopy(base)
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), paths[0])  # type: ignore[arg-type]
    their_anew: list[Any] = [PeftModel.from_pretrained(their_base, paths[0])]  # type: ignore[arg-type]
    from_memory = copy.deepcopy(base)
    their_memory: Any = PeftModel.from_pretrained(copy.deepcopy(base), paths[0])  # type: ignore[arg-type]
    for model in (swapped, anew, from_memory):
        load_adapter(model, paths[0])
        if is_merged:
            merge(model)
    turns = {name: in_turn(paths) for name in ("ours", "anew", "peft", "peft anew")}
    turns |= {"memory": in_turn([*map(read_adapter, paths)]), "peft memory": in_turn([*map(in_memory, paths)])}

    def load_anew() -> None:
        unload(anew)
        load_adapter(anew, turns["anew"]())
        if is_merged:
            merge(anew)

    def hotswap() -> None:
        if is_merged:
            theirs.unmerge_adapter()
        hotswap_adapter(theirs, turns["peft"](), "default", torch_device="cpu")
        if is_merged:
            theirs.merge_adapter()

    def hotswap_from_memory() -> None:
        if is_merged:
            their_memory.unmerge_adapter()
        state, config = turns["peft memory"]()
        hotswap_adapter_from_state_dict(their_memory, state, "default", config)
        their_memory.set_adapter("default")
        if is_merged:
            their_memory.merge_adapter()

    def peft_anew() -> None:
        plain = their_anew[0].unload()
        their_anew[0] = PeftModel.from_pretrained(plain, turns["peft anew"]())
        if is_merged:
            their_anew[0].merge_adapter()

    if is_merged:
        theirs.merge_adapter()
        their_memory.merge_adapter()
    functions = {
        "ours": lambda: load_adapter(swapped, turns["ours"]()),
        "anew": load_anew,
        "peft": hotswap,
        "peft anew": peft_anew,
        "memory": lambda: load_adapter(from_memory, turns["memory"]()),
        "peft memory": hotswap_from_memory,
    }
    times = interleaved(functions, seconds, "cpu")
    ratios = [against(ratio(times, ["ours"], [name])) for name in ("peft", "anew", "peft anew")]
    memory = [f"{milliseconds(times, 'memory'):.1f} ms", against(ratio(times, ["memory"], ["peft memory"]))]
    return [f"{milliseconds(times, 'ours'):.1f} ms", *ratios, *memory]


def rows(layers: int, width: int, seconds: float) -> Iterator[list[str]]:
    torch.manual_seed(0)
    base = Layers(layers, width).requires_grad_(False)
    for ranks, is_merged in itertools.product(((16, 16), (16, 8)), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            paths = adapters(Path(folder), base, *ranks)
            state = "merged" if is_merged else "factored"
            yield [" and ".join(map(str, ranks)), state, *measured(base, paths, is_merged, seconds)]


HEADER = (
    "| ranks | the model is | a swap | of peft's hotswap | of our loading anew | of peft's loading anew "
    "| from memory | of peft's from memory |"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table(HEADER, rows(options.layers, options.width, options.seconds))


if __name__ == "__main__":
    main()
