"""Every table of README.md by one command: python tests/benchmarks/run.py NAME...

Without a name it measures the network, whose table and plot come first. `all` measures every table, with the options
that README.md's figures were measured with. For one name, the program's own options may follow:

    python tests/benchmarks/run.py dora --seconds 5
    python tests/benchmarks/run.py dora --help
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A file beside this one that prints tables."""

    file: str
    about: str
    tables: tuple[str, ...]  # the names of the constants that hold the tables' headers
    options: str = ""  # that README.md's figures were measured with

    def headers(self) -> list[str]:
        """Return the first line of each of its tables."""
        module = importlib.import_module(self.file)
        found = (getattr(module, name) for name in self.tables)
        return [header if isinstance(header, str) else header[0] for header in found]

    def run(self, options: list[str]) -> None:
        importlib.import_module(self.file).main(options)


ONE_THREAD = "--seconds 5 --threads 1"
PROGRAMS = {
    "network": Program(
        "network",
        "steps, forwards, merges, memory, many layers and Trainer.fit, against peft, loralib and the floor",
        ("HEADER",),
    ),
    "drift": Program("drift", "what merging and unmerging leave behind in frozen weights", ("HEADER",)),
    "launches": Program("launches", "what a device is asked to do, counted; no GPU is needed", ("HEADER",)),
    "quantised": Program("quantised", "steps on bases of bitsandbytes", ("HEADER",), "--width 512"),
    "parameters": Program("parameters", "LSTM, GRU and Mixtral by target_parameters", ("HEADER",), ONE_THREAD),
    "blocks": Program("blocks", "merges with other sizes of blocks", ("HEADER",), "--threads 1"),
    "experts": Program("experts", "one stack of experts, in four ways", ("HEADER",)),
    "rows": Program("rows", "trained rows of tables", ("HEADER",), ONE_THREAD),
    "dora": Program("dora", "DoRA", ("HEADER",), ONE_THREAD),
    "swap": Program("swap", "one adapter in the place of another", ("HEADER",), "--seconds 10 --threads 1"),
    "starts": Program(
        "starts",
        "starts from the weight",
        ("START_HEADER", "STEP_HEADER"),
        "--threads 1 --rounds 2 --width 256 768 --seconds 5 --hidden",
    ),
    "data": Program(
        "starts",
        "starts from data",
        ("DATA_HEADER",),
        "--sides --width --hidden 256 --data-rounds 3 --threads 1",
    ),
    "large": Program("merge_large", "lightning-lora merge of a big model", ("HEADER",), "--gigabytes 2 8"),
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
        PROGRAMS[name].run(options or PROGRAMS[name].options.split())


def usage() -> str:
    return "\n".join([str(__doc__), *(f"  {name:12}{program.about}" for name, program in PROGRAMS.items())])


if __name__ == "__main__":
    main()
