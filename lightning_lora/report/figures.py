"""plot_adapter: draw one adapter, two adapters or a run's log, as figures of matplotlib and into a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..files.atomic import new_file
from ..files.paths import PathLike, given_path
from ..formats.forms import form_of
from ..names import listed
from .from_files import read_updates
from .from_model import updates_of_model
from .pictures import pictures_of, require_matplotlib
from .run_log import is_log, read_statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .canvas import Picture
    from .updates import Updates

SUFFIXES = (".png", ".pdf", ".svg")


def plot_adapter(
    source: PathLike | Mapping[str, Any] | Adapter | nn.Module,
    other: PathLike | Mapping[str, Any] | Adapter | nn.Module | None = None,
    *,
    base: PathLike | None = None,
    strict_base: bool = True,
    output: PathLike | None = None,
) -> dict[str, Figure]:
    """Draw an adapter, two adapters, or the statistics of a run. Collective where a model is sharded.

    The figures do not use pyplot, and no window opens.

    Args:
        source: an injected model; a PEFT folder, a checkpoint or anything else that load_adapter takes; or a log: the
            metrics.csv of a CSVLogger, events of TensorBoard, or the folder of one of these.
        other: a second adapter, to compare with the first.
        base: the weights on disk that an adapter in a file was trained on. Norms are then relative to the weights'.
        strict_base: whether another base than the adapter's is an error or a warning.
        output: a file to write all figures to, below each other: .png, .pdf or .svg. It has no background
            and can lie on a light or a dark page.

    Returns:
        Figures by name: "norms" and "spectra" of one adapter, "comparison" of two, "statistics" of a log.

    Raises:
        LoRAError: matplotlib is missing, there is nothing to draw, or the output cannot be written.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> figures = plot_adapter(model, output="adapter.png")
        >>> print(*figures)
        norms spectra
    """
    require_matplotlib("plot_adapter")
    if output is not None:
        check_suffix(output)
    pictures = _pictures(source, other, base, strict_base)
    from .canvas import to_figure, to_page

    if output is not None:
        with new_file(output) as file:
            to_page([*pictures.values()]).savefig(file, facecolor="none")
    return {name: to_figure(picture) for name, picture in pictures.items()}


def check_suffix(output: PathLike) -> None:
    """Raise LoRAError where a file's name ends in no suffix of SUFFIXES."""
    if Path(output).suffix.lower() not in SUFFIXES:
        raise LoRAError(f"plot: the output {Path(output).name!r} must end in one of {', '.join(SUFFIXES)}.")


def _pictures(source: Any, other: Any, base: PathLike | None, strict_base: bool) -> dict[str, Picture]:
    logs = [each for each in (source, other) if each is not None and is_log(each)]
    if logs:
        if other is not None or base is not None:
            raise LoRAError(f"plot: {logs[0]} is a log of a run, which is drawn by itself; leave out other and base.")
        from .run import run_picture

        return {"statistics": run_picture(read_statistics(source))}
    updates = _updates(source, base, strict_base)
    if other is None:
        return pictures_of(updates)
    from .comparison import comparison_picture

    return {"comparison": comparison_picture(updates, _updates(other, base, strict_base))}


def _updates(source: Any, base: PathLike | None, strict_base: bool) -> Updates:
    if isinstance(source, (str, os.PathLike)):
        _refuse_folder_of_runs(source)
    if not isinstance(source, nn.Module):
        return read_updates(source, base, strict_base=strict_base)
    if base is not None:
        raise LoRAError("plot: base is for adapters in files; a model has its own weights.")
    return updates_of_model(source)


def _refuse_folder_of_runs(path: PathLike) -> None:
    """Raise LoRAError where a folder holds neither an adapter nor a log itself, but folders with a log each."""
    if form_of(path) != "folder":
        return
    runs = [str(each) for each in sorted(given_path(path).iterdir()) if each.is_dir() and is_log(each)]
    if runs:
        raise LoRAError(f"plot: {path}: holds no log itself, but folders with one each. Give one: {listed(runs)}.")
