"""Conclude in one sentence what a picture shows. A stated rule chooses the sentence from the drawn numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from ..names import cut_at_left
from .layout import Cell, cell_name
from .run_log import Points, Statistics, first_not_finite
from .updates import Updates, half_share

LONGEST = 44  # characters of a layer's name

# Update norms: layers have moved alike where the largest norm is less than this many times the median.
ALIKE = 3.0
# Spectra: the share of the squared norm in the larger half of the r directions. From TOO_LARGE on, r is too large:
# without the other half the update changes by at most a tenth of its norm. Up to TOO_SMALL, r is too small: a flat
# spectrum has 1/2.
TOO_LARGE, TOO_SMALL = 0.99, 0.75
# Two adapters: the median cosine from which on they point the same way, and up to which they agree only slightly.
SAME, SLIGHT = 0.9, 0.1
# The cosine of two random updates of n weights has a standard deviation of 1 / sqrt(n). A cosine within this many
# deviations may be chance.
CHANCE = 3.0
# Statistics: a run has settled where its last quarter changes the norms by at most this share.
SETTLED = 0.05


def on_norms(updates: Updates) -> str:
    """Say which layer moved most, and how much more than the median layer, by the rule ALIKE.

    Where the weights' norms are not known, the sentence is about the root mean square of each update.
    """
    relative = updates.relative
    measured = updates.norms(relative=relative)
    broken = [cell for cell, norm in updates.norms(relative=False).items() if not math.isfinite(norm)]
    if broken:
        return f"{_counted(len(broken), 'update')} of {len(measured)} not finite, first {_name(broken[0])}"
    norms = {cell: norm for cell, norm in measured.items() if math.isfinite(norm)}
    left_out = len(measured) - len(norms)
    if not norms:
        return "All weights are zero or not finite, so nothing tells how far they moved"
    unseen = "; scales do not count" if updates.adapter.variant.reads_weight else ""
    if not any(measured.values()):
        return f"{'Every' if unseen else 'Nothing has moved: every'} update is zero{unseen}"
    largest = max(norms, key=lambda cell: norms[cell])
    middle, still = median(norms.values()), sum(not norm for norm in norms.values())
    rest = f"; {still} of {len(measured)} did not move" if still else ""
    rest += f"; of {left_out} the weights are zero or not finite" if left_out else ""
    rest += unseen if updates.scaled else f"; without s, which is not stored{unseen}"
    return (_on_shares if relative else _on_sizes)(norms, largest, middle) + rest


def _on_shares(norms: Mapping[Cell, float], largest: Cell, middle: float) -> str:
    amount = _percent(norms[largest])
    if len(norms) == 1:
        return f"{_name(largest)} moved by {amount} of its weight"
    if norms[largest] < ALIKE * middle:
        return f"Layers moved alike: median {_percent(middle)} of their weights, most {_name(largest)}, {amount}"
    return f"{_name(largest)} moved most: {amount} of its weight{_times(norms[largest], middle)}"


def _on_sizes(norms: Mapping[Cell, float], largest: Cell, middle: float) -> str:
    amount = f"rms {_number(norms[largest])}"
    if len(norms) == 1:
        return f"The update of {_name(largest)} has {amount}"
    if norms[largest] < ALIKE * middle:
        return f"Updates are alike in size: median rms {_number(middle)}, largest {_name(largest)}, {amount}"
    return f"{_name(largest)} has the largest update: {amount}{_times(norms[largest], middle)}"


def _times(largest: float, middle: float) -> str:
    return f", {_number(largest / middle)} times the median" if middle else ""


def on_spectra(updates: Updates) -> str:
    """Say whether r is too small, too large or fits, by the median of half_share over all updates."""
    r = f"r = {_range(sorted({update.rank for update in updates.layers.values()}))}"
    spectra = [spectrum for update in updates.layers.values() for spectrum in update.spectra]
    directions = sorted(set(map(len, spectra)))
    if directions == [1]:
        return f"{r}: a single direction does not tell whether more would help"
    share = median_share(spectra)
    if math.isnan(share):
        return f"{r}: the updates are zero or not finite, so nothing tells whether r fits"
    held = f"{half_text(directions)} directions hold {held_text(share)} of the update"
    full = [update.has_full_rank for update in updates.layers.values()]
    if verdict(share) == "small" and sum(full) > len(full) / 2:
        return f"{r} cannot be too small, for it is as large as {'the' if all(full) else 'most'} layers are: {held}"
    return {
        "large": f"{r} is larger than needed: {held}",
        "small": f"{r} may be too small: {held}, nearly as flat as can be",
        "fits": f"{r} fits: {held}",
    }[verdict(share)]


def half_text(ranks: Sequence[int]) -> str:
    """Return words for the directions that half_share counts."""
    return f"{(ranks[0] + 1) // 2} of {ranks[0]}" if len(ranks) == 1 else "half of the"


def verdict(share: float) -> str:
    """Return whether r is too "large", too "small" or "fits", for a median of half_share."""
    return "large" if share >= TOO_LARGE else "small" if share <= TOO_SMALL else "fits"


def median_share(spectra: Iterable[tuple[float, ...]]) -> float:
    """Return the median of half_share over spectra of several directions, or NaN where none has a share."""
    shares = [half_share(spectrum) for spectrum in spectra if len(spectrum) > 1]
    finite = [share for share in shares if math.isfinite(share)]
    return median(finite) if finite else math.nan


def held_text(share: float) -> str:
    """Return a share as a percentage, which is never rounded up to 100%."""
    return "over 99.9%" if share > 0.999 else _percent(share)


def on_comparison(first: Updates, second: Updates, found: Mapping[Cell, float]) -> str:
    """Say whether two adapters' updates point the same way, by the median cosine, and which are larger."""
    finite = {cell: value for cell, value in found.items() if math.isfinite(value)}
    if not finite:
        return "Nothing to compare: updates of one of the two are zero, not finite, or of other shapes"
    related = relation(list(finite.values()), [first.size_of(cell) for cell in finite])
    sizes = f"the second's are {_number(_ratio(first, second, finite))} times as large"
    if not first.scaled and not second.scaled:
        sizes += " without s, which neither stores"
    elif first.scaled != second.scaled:
        sizes = "one of the two does not store s, so nothing tells which are larger"
    return f"The updates {related}: median cosine {_exact_text(median(finite.values()))}; {sizes}"


def relation(cosines: Sequence[float], sizes: Sequence[int]) -> str:
    """Say how updates are related.

    A median cosine within CHANCE deviations means unrelated updates, unless most single cosines lie outside, some of
    them positive and some negative.

    Args:
        cosines: between two adapters' updates, one a cell.
        sizes: the number of weights that the update of each cell changes.
    """
    middle = median(cosines)
    roots = [math.sqrt(size) for size in sizes]
    by_chance = math.sqrt(math.pi / 2 * len(roots)) / math.fsum(roots)  # the deviation of a median
    if abs(middle) <= CHANCE * by_chance:
        deviations = [cosine * root for cosine, root in zip(cosines, roots, strict=True)]
        agree, oppose = sum(each > CHANCE for each in deviations), sum(each < -CHANCE for each in deviations)
        mixed = agree and oppose and agree + oppose > len(roots) / 2
        return "agree in some layers and are opposed in others" if mixed else "are unrelated"
    if abs(middle) >= SAME:
        return f"point {'the same way' if middle > 0 else 'in opposite ways'}"
    return f"{'agree' if middle > 0 else 'are opposed'} {'in part' if abs(middle) > SLIGHT else 'slightly'}"


def _ratio(first: Updates, second: Updates, cells: Iterable[Cell]) -> float:
    """Return the norm of the second's updates divided by the norm of the first's, over shared layers in the cells."""
    shared = [name for cell in cells for name in first.cells[cell] if name in second.layers]
    totals = [math.hypot(*(each.layers[name].norm for name in shared)) for each in (first, second)]
    return totals[1] / totals[0]


def _exact_text(value: float) -> str:
    """Return a cosine as text, with at least one digit that is not 0 unless it is zero."""
    return cosine_text(value) if not value or abs(value) >= 0.005 else f"{value:.1g}"


def cosine_text(value: float) -> str:
    """Return a cosine as text with two decimals; never -0.00."""
    return f"{round(value, 2) + 0.0:.2f}"


def on_statistics(statistics: Statistics) -> str:
    """Say whether the updates still change at the end of the run, by the rule SETTLED for the median over groups.

    The sentence begins with values that are not finite where they stay so to the end, and ends with such values where
    later values are finite again.
    """
    broken = [(*found[::-1], name) for name, series in statistics.series.items() if (found := first_not_finite(series))]
    if not broken:
        return _on_changes(statistics)
    step, group, statistic = min(broken)
    points = statistics.series[statistic][group]
    if any(math.isfinite(value) for at, value in points if at > step):
        return f"{_on_changes(statistics)}; not finite at step {step:.0f}: {statistic} of {group}"
    return f"Not finite from step {step:.0f} on: {statistic} of {group}"


def _on_changes(statistics: Statistics) -> str:
    norms = statistics.series.get("norm", {})
    changes = [change for change in map(_last_quarter, norms.values()) if change is not None]
    if not changes:
        count = sum(map(len, statistics.series.values()))
        return f"{_counted(len(statistics.series), 'statistic')} over a run, {_counted(count, 'line')}"
    change = median(changes)
    if abs(change) <= SETTLED:
        return f"The updates have settled: their norms changed by {change:+.1%} over the last quarter"
    word = "grow" if change > 0 else "shrink"
    return f"The updates still {word}: their norms changed by {change:+.1%} over the last quarter"


def _last_quarter(points: Points) -> float | None:
    """Return the relative change of a value over the last quarter of its steps, or None for fewer than three points.

    The value at the beginning of that quarter is interpolated between points.
    """
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if len(known) < 3:
        return None
    (begin, _), (end, last) = known[0], known[-1]
    mark = begin + 0.75 * (end - begin)
    (left, before), (right, after) = next(pair for pair in pairwise(known) if pair[1][0] >= mark)
    at_mark = before + (after - before) * (mark - left) / (right - left) if right > left else after
    return last / at_mark - 1 if at_mark else None


def _name(cell: Cell) -> str:
    return cut_at_left(cell_name(cell), LONGEST)


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _percent(share: float) -> str:
    return f"{_number(100 * share)}%"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
