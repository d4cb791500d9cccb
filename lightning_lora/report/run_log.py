"""Read an adapter's statistics over a run from a logger's file: columns `lora/<group>/<statistic>` by step."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import LoRAError
from ..files.paths import PathLike, given_path, kind_of

COLUMN = re.compile(r"lora/(?:(?P<group>.+)/)?(?P<statistic>[^/]+)")
CSV = "metrics.csv"  # the file of a CSVLogger
EVENTS = "events.out.tfevents."  # the beginning of the names of TensorBoard's files
ALL = "all layers"  # the group of a statistic of the whole adapter

Points = tuple[tuple[float, float], ...]  # step and value, ascending
Series = Mapping[str, Points]  # by group


@dataclass(frozen=True)
class Statistics:
    """Values by statistic, group and step, and the name of their log."""

    source: str
    series: Mapping[str, Series]  # by statistic


def is_log(path: object) -> bool:
    """Return whether a path is a logger's file or a folder with such a file, by the names of files."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    path = given_path(path)
    return path.suffix == ".csv" or EVENTS in path.name or _log_in(path) is not None


def _log_in(folder: Path) -> Path | None:
    """Return the CSV file in a folder, else the folder where it holds TensorBoard's events, else None."""
    if kind_of(folder) != "folder":
        return None
    if kind_of(folder / CSV) == "file":
        return folder / CSV
    return next(iter(sorted(folder.glob(f"{EVENTS}*"))), None) and folder


def read_statistics(path: PathLike) -> Statistics:
    """Read the statistics of an adapter from a CSV file, from TensorBoard's events, or from a folder with either.

    Raises:
        LoRAError: the log holds no statistics, is damaged, or needs tensorboard, which is not installed.
    """
    log = _log_in(Path(path)) or Path(path)
    points = _read_csv(log) if log.suffix == ".csv" else _read_events(log)
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, step, value in points:
        match = COLUMN.fullmatch(name)
        if match:
            series.setdefault(match["statistic"], {}).setdefault(match["group"] or ALL, []).append((step, value))
    if not series:
        raise LoRAError(
            f"plot: {path}: holds no statistics of an adapter (names such as lora/q_proj/norm); LoRAMonitor logs them."
        )
    sorted_series = {
        statistic: {group: tuple(sorted(of_group, key=lambda point: point[0])) for group, of_group in groups.items()}
        for statistic, groups in series.items()
    }
    return Statistics("/".join(log.parts[-2:]), sorted_series)


def _read_csv(path: Path) -> Iterable[tuple[str, float, float]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            if "step" not in (reader.fieldnames or ()):
                raise LoRAError(f"plot: {path}: has no column `step`; it is not the metrics.csv of a CSVLogger.")
            return [
                (name, float(row["step"]), float(text))
                for row in rows
                for name, text in row.items()
                if name and COLUMN.fullmatch(name) and text
            ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, LoRAError):
            raise
        raise LoRAError(f"plot: {path}: cannot be read as a CSV file of numbers: {error}.") from error


def _read_events(path: Path) -> Iterable[tuple[str, float, float]]:
    if find_spec("tensorboard") is None:
        raise LoRAError(f"plot: {path}: TensorBoard's events need tensorboard; pip install tensorboard.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all
    events.Reload()
    return [
        (name, float(event.step), float(event.value))
        for name in events.Tags()["scalars"]
        if COLUMN.fullmatch(name)
        for event in events.Scalars(name)
    ]


def first_not_finite(series: Series) -> tuple[str, float] | None:
    """Return the group and step of the first value that is NaN or infinite, or None."""
    found = [(step, group) for group, points in series.items() for step, value in points if not math.isfinite(value)]
    return (min(found)[1], min(found)[0]) if found else None
