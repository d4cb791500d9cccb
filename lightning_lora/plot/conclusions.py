"""What a picture shows, in one sentence: each is chosen by a stated rule from the numbers that are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from .layout import Cell, cell_name, shortened
from .statistics import Points, Statistics, first_not_finite
from .updates import Updates, half_share

LONGEST = 44  # characters of a layer's name

# Of update norms: the largest over the median, below which the layers have moved alike.
ALIKE = 3.0
# Of spectra: the share of the squared norm in the larger half of the r directions. Above: without the other half, the
# update changes by less than a tenth of its norm. Below: the spectrum is near flat, at 1/2.
TOO_LARGE, TOO_SMALL = 0.99, 0.75
# Of two adapters: the median cosine.
SAME, UNRELATED = 0.9, 0.1
# Of statistics: the last quarter of a run changes norms by less.
SETTLED = 0.05


def on_norms(updates: Updates) -> str:
    """Say which layer moved most, and how much more than the median one; ALIKE is the rule."""
    relative = updates.relative
    norms = updates.norms(relative=relative)
    unit, amount = (" of its weight", _percent) if relative else ("", _number)
    broken = [cell for cell, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        return f"{_counted(len(broken), 'update')} of {len(norms)} not finite, first {_name(broken[0])}"
    largest = max(norms, key=lambda cell: norms[cell])
    if not norms[largest]:
        return "Nothing has moved: every update is zero"
    middle, still = median(norms.values()), sum(not norm for norm in norms.values())
    rest = f"; {still} of {len(norms)} did not move" if still else ""
    if len(norms) == 1:
        return f"{_name(largest)} moved by {amount(norms[largest])}{unit}"
    if norms[largest] < ALIKE * middle:
        most = f"most {_name(largest)}, {amount(norms[largest])}"
        return f"Layers moved alike: median {amount(middle)}{' of their weights' if relative else ''}, {most}{rest}"
    times = f", {norms[largest] / middle:.3g} times the median" if middle else ""
    return f"{_name(largest)} moved most: {amount(norms[largest])}{unit}{times}{rest}"


def on_spectra(updates: Updates) -> str:
    """Say whether r is too small, too large or fits; the median of half_share over all updates is the rule."""
    ranks = sorted({update.rank for update in updates.layers.values()})
    r = f"r = {_range(ranks)}"
    if ranks == [1]:
        return "r = 1: a single direction does not tell whether more would help"
    share = median_share(spectrum for update in updates.layers.values() for spectrum in update.spectra)
    if math.isnan(share):
        return f"{r}: the updates are zero or not finite, so nothing tells whether r fits"
    held = f"{half_text(ranks)} directions hold {held_text(share)} of the update"
    return {
        "large": f"{r} is larger than needed: {held}",
        "small": f"{r} may be too small: {held}, nearly as flat as can be",
        "fits": f"{r} fits: {held}",
    }[verdict(share)]


def half_text(ranks: Sequence[int]) -> str:
    """Write which directions half_share counts."""
    return f"{(ranks[0] + 1) // 2} of {ranks[0]}" if len(ranks) == 1 else "half of the"


def verdict(share: float) -> str:
    """Return "large", "small" or "fits" for a median of half_share."""
    return "large" if share >= TOO_LARGE else "small" if share <= TOO_SMALL else "fits"


def median_share(spectra: Iterable[tuple[float, ...]]) -> float:
    """Return the median of half_share over spectra of several directions that have one; else NaN."""
    shares = [half_share(spectrum) for spectrum in spectra if len(spectrum) > 1]
    finite = [share for share in shares if math.isfinite(share)]
    return median(finite) if finite else math.nan


def held_text(share: float) -> str:
    """Write a share, and never a rounded 100%."""
    return "over 99.9%" if share > 0.999 else _percent(share)


def on_comparison(first: Updates, second: Updates, found: Mapping[Cell, float]) -> str:
    """Say whether two adapters' updates point the same way, and which are larger; the median cosine is the rule."""
    finite = [value for value in found.values() if math.isfinite(value)]
    if not finite:
        return "Nothing to compare: updates of one of the two are zero, not finite, or of other shapes"
    middle = median(finite)
    if abs(middle) <= UNRELATED:
        found_that = "The updates are unrelated"
    elif abs(middle) >= SAME:
        found_that = f"The updates point {'the same way' if middle > 0 else 'in opposite ways'}"
    else:
        found_that = f"The updates {'agree' if middle > 0 else 'are opposed'} in part"
    totals = [math.hypot(*each.norms(relative=False).values()) for each in (first, second)]
    ratio = totals[1] / totals[0] if totals[0] else math.nan
    return f"{found_that}: median cosine {cosine_text(middle)}; the second's are {ratio:.3g} times as large"


def cosine_text(value: float) -> str:
    """Write a cosine, and no -0.00."""
    return f"{round(value, 2) + 0.0:.2f}"


def on_statistics(statistics: Statistics) -> str:
    """Say whether the updates still change at the end of the run; SETTLED is the rule, by the median over groups."""
    for statistic, series in statistics.series.items():
        broken = first_not_finite(series)
        if broken:
            return f"Not finite from step {broken[1]:.0f} on: {statistic} of {broken[0]}"
    norms = statistics.series.get("norm")
    changes = [change for change in map(_last_quarter, norms.values()) if change is not None] if norms else []
    if not changes:
        count = sum(map(len, statistics.series.values()))
        return f"{_counted(len(statistics.series), 'statistic')} over a run, {_counted(count, 'line')}"
    change = median(changes)
    if abs(change) <= SETTLED:
        return f"The updates have settled: their norms changed by {change:+.1%} over the last quarter"
    word = "grow" if change > 0 else "shrink"
    return f"The updates still {word}: their norms changed by {change:+.1%} over the last quarter"


def _last_quarter(points: Points) -> float | None:
    """Return the relative change of a value since three quarters of the steps were done."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if len(known) < 2:
        return None
    begin, end = known[0][0], known[-1][0]
    before = [value for step, value in known if step <= begin + 0.75 * (end - begin)][-1]
    return known[-1][1] / before - 1 if before else None


def _name(cell: Cell) -> str:
    return shortened(cell_name(cell), LONGEST)


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
