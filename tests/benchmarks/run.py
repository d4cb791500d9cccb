"""Every table of README.md by one command: python tests/benchmarks/run.py NAME...

Without a name it measures the network, whose table and plot come first. `all` measures every table. For one name, the
program's own options may follow:

    python tests/benchmarks/run.py swap --seconds 5
    python tests/benchmarks/run.py swap --help
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Program:
    """A file beside this one that prints tables; its defaults are what README.md's figures were measured with."""

    file: str
    about: str

    @property
    def module(self) -> Any:
        return importlib.import_module(self.file)

    def headers(self) -> list[str]:
        """Return the first line of each of its tables."""
        if hasattr(self.module, "HEADERS"):
            return [*self.module.HEADERS]
        header = self.module.HEADER
        return [header if isinstance(header, str) else header[0]]


PROGRAMS = {
    "network": Program("network", "the network: steps, forwards, merges, memory, many layers, Trainer.fit"),
    "drift": Program("drift", "drift of frozen weights that are merged and unmerged"),
    "loop": Program("merge_each_step", "what drift costs a run that merges at every step; 10 to 25 minutes"),
    "module": Program("peft_in_module", "PEFT inside a LightningModule: lines, checkpoints, resuming, validation"),
    "variants": Program("variants", "DoRA, quantized bases, single parameters and rows, a step of PiSSA"),
    "starts": Program("starts", "starting from the weight"),
    "shrink": Program("shrink", "shrinking an adapter; a minute or two"),
    "regret": Program("regret", "LoRA against full fine-tuning: rates, ranks and layers; half an hour on two cores"),
    "swap": Program("swap", "swapping adapters"),
    "large": Program("merge_large", "merging a big model; needs 24 GB of disk"),
    "launches": Program("launches", "what a GPU is asked to do, counted without one"),
}
ALL = "all"


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    count = next((i for i, argument in enumerate(given) if argument.startswith("-")), len(given))
    names, options = given[:count] or ["network"], given[count:]
    if given in (["--help"], ["-h"]):
        print(usage())
        return
    unknown = [name for name in names if name not in (*PROGRAMS, ALL)]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is no table.\n\n{usage()}")
    if ALL in names:
        names = [*PROGRAMS]
    if options and len(names) > 1:
        raise SystemExit(f"Options are for one table, not for {len(names)}.")
    for name in names:
        print(f"{name}: {PROGRAMS[name].about}", flush=True)
        PROGRAMS[name].module.main(options)


def usage() -> str:
    return "\n".join([str(__doc__), *(f"  {name:12}{program.about}" for name, program in PROGRAMS.items())])


if __name__ == "__main__":
    main()
