"""Titles: what each says on both sides of the threshold of its rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_lora.adapter.adapter import Adapter
from lightning_lora.plot import conclusions
from lightning_lora.plot.layout import arrange, cells, depth_of, projections, shortened
from lightning_lora.plot.statistics import Statistics
from lightning_lora.plot.updates import Update, Updates


def updates(spectra: dict[str, tuple[float, ...]], weight_norm: float | None = 10.0) -> Updates:
    layers = {name: Update(len(values), (values,), weight_norm) for name, values in spectra.items()}
    return Updates("run", Adapter({}), layers)


def of_norms(*norms: float, weight_norm: float | None = 10.0) -> Updates:
    return updates({f"layers.{i}.q_proj": (norm, 0.0) for i, norm in enumerate(norms)}, weight_norm)


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ((1.0, 1.0, 2.99), "Layers moved alike: median 10% of their weights, most q_proj of layer 2, 29.9%"),
        ((1.0, 1.0, 3.01), "q_proj of layer 2 moved most: 30.1% of its weight, 3.01 times the median"),
        (
            (1.0, 1.0, 0.0),
            "Layers moved alike: median 10% of their weights, most q_proj of layer 0, 10%; 1 of 3 did not move",
        ),
        ((0.0, 0.0, 1.0), "q_proj of layer 2 moved most: 10% of its weight; 2 of 3 did not move"),
        ((0.0, 0.0), "Nothing has moved: every update is zero"),
        ((0.5,), "q_proj of layer 0 moved by 5% of its weight"),
        ((1.0, math.nan, math.inf), "2 updates of 3 not finite, first q_proj of layer 1"),
    ],
)
def test_title_of_norms_follows_the_largest_over_the_median(norms: tuple[float, ...], said: str):
    assert conclusions.on_norms(of_norms(*norms)) == said


def test_title_of_norms_without_weights_is_absolute():
    assert conclusions.on_norms(of_norms(1.0, 1.0, 4.0, weight_norm=None)) == (
        "q_proj of layer 2 moved most: 4, 4 times the median"
    )


def spectrum(share: float, rank: int = 4) -> tuple[float, ...]:
    """One whose larger half of the directions holds this share."""
    half = rank // 2
    return (*[math.sqrt(share / half)] * half, *[math.sqrt((1 - share) / half)] * half)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.7499, "r = 4 may be too small: 2 of 4 directions hold 75% of the update, nearly as flat as can be"),
        (0.7501, "r = 4 fits: 2 of 4 directions hold 75% of the update"),
        (0.9899, "r = 4 fits: 2 of 4 directions hold 99% of the update"),
        (0.9901, "r = 4 is larger than needed: 2 of 4 directions hold 99% of the update"),
        (1.0, "r = 4 is larger than needed: 2 of 4 directions hold over 99.9% of the update"),
    ],
)
def test_title_of_spectra_follows_the_share_of_half_the_directions(share: float, said: str):
    assert conclusions.on_spectra(updates({"q_proj": spectrum(share)})) == said


def test_title_of_spectra_is_of_the_median_layer_and_names_the_ranks():
    found = updates({"a": spectrum(0.6), "b": spectrum(0.9), "c": spectrum(1.0, rank=8), "zero": (0.0,) * 4})
    assert conclusions.on_spectra(found) == "r = 4 to 8 fits: half of the directions hold 90% of the update"


def test_layers_of_a_single_direction_have_no_part_in_the_median():
    assert conclusions.median_share([(1.0,), (2.0,), spectrum(0.8)]) == pytest.approx(0.8)


def test_title_of_spectra_that_tell_nothing_says_so():
    zero, one = updates({"a": (0.0, 0.0)}), updates({"a": (1.0,)})
    assert conclusions.on_spectra(zero).startswith("r = 2: the updates are zero or not finite, so nothing tells")
    assert conclusions.on_spectra(one) == "r = 1: a single direction does not tell whether more would help"
    some = replace(one, layers={**one.layers, "b": Update(2, ((3.0, 0.0),))})
    assert conclusions.on_spectra(some).startswith("r = 1 to 2 is larger than needed")


@pytest.mark.parametrize(
    ("cosine", "said"),
    [
        (0.91, "The updates point the same way"),
        (0.89, "The updates agree in part"),
        (0.11, "The updates agree in part"),
        (0.09, "The updates are unrelated"),
        (-0.09, "The updates are unrelated"),
        (-0.11, "The updates are opposed in part"),
        (-0.89, "The updates are opposed in part"),
        (-0.91, "The updates point in opposite ways"),
    ],
)
def test_title_of_a_comparison_follows_the_median_cosine(cosine: float, said: str):
    found = {("q", 0): cosine, ("q", 1): math.nan, ("q", 2): -1.0, ("q", 3): 1.0}
    title = conclusions.on_comparison(of_norms(3.0, 4.0), of_norms(6.0, 8.0), found)
    assert title == f"{said}: median cosine {cosine:.2f}; the second's are 2 times as large"


def test_title_of_a_comparison_without_any_cosine_says_why():
    title = conclusions.on_comparison(of_norms(1.0), of_norms(0.0), {("q", 0): math.nan})
    assert title.startswith("Nothing to compare: updates of one of the two are zero")


def over_a_run(last: float, **others: tuple[tuple[float, float], ...]) -> Statistics:
    points = ((0.0, 0.1), (75.0, 1.0), (90.0, 3.0), (100.0, last))
    return Statistics("log", {"norm": {"q_proj": points}, **{name: {"q_proj": each} for name, each in others.items()}})


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (1.049, "The updates have settled: their norms changed by +4.9% over the last quarter"),
        (1.051, "The updates still grow: their norms changed by +5.1% over the last quarter"),
        (0.951, "The updates have settled: their norms changed by -4.9% over the last quarter"),
        (0.949, "The updates still shrink: their norms changed by -5.1% over the last quarter"),
    ],
)
def test_title_of_a_run_follows_what_norms_do_in_the_last_quarter(last: float, said: str):
    assert conclusions.on_statistics(over_a_run(last)) == said


def test_title_of_a_run_names_the_first_value_that_is_not_finite():
    broken = over_a_run(1.0, grad_A=((0.0, 1.0), (50.0, math.nan), (60.0, math.inf)))
    assert conclusions.on_statistics(broken) == "Not finite from step 50 on: grad_A of q_proj"


def test_title_of_a_run_without_norms_counts():
    only = Statistics("log", {"rank": {"q": ((0.0, 2.0),), "v": ((0.0, 2.0),)}})
    assert conclusions.on_statistics(only) == "1 statistic over a run, 2 lines"


# --- where a layer stands ---


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.layers.7.self_attn.q_proj", 7),
        ("layers.11.q_proj", 11),
        ("body.3", 3),
        ("0", 0),
        ("encoder.block.2.layer.1.DenseReluDense.wi", 2),
        ("lm_head", None),
        ("layer1.conv", None),
    ],
)
def test_depth_is_the_first_number_in_a_name(name: str, depth: int | None):
    assert depth_of(name) == depth


def test_projections_are_endings_with_what_tells_stacks_apart():
    names = {
        "encoder.block.0.layer.0.SelfAttention.q": "encoder.SelfAttention.q",
        "encoder.block.1.layer.0.SelfAttention.q": "encoder.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q": "decoder.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q": "decoder.EncDecAttention.q",
        "decoder.block.0.layer.2.DenseReluDense.wi": "wi",
        "shared": "shared",
    }
    assert projections(names) == names
    assert list(cells(names)) == [(value, depth_of(name)) for name, value in names.items()]


def test_a_grid_has_layers_by_number_and_those_without_one_last():
    grid = arrange({("q", 10): 1.0, ("head", None): 2.0, ("q", 2): 3.0})
    assert (grid.rows, grid.columns) == (("q", "head"), (2, 10, None))
    assert grid.values[0][:2] == (3.0, 1.0)
    assert grid.values[1][2] == 2.0
    assert grid.empty == {(0, 2), (1, 0), (1, 1)}


def test_a_long_name_loses_its_middle():
    assert shortened("short", 10) == "short"
    assert shortened("abcdefghijklmnop", 10) == "ab...lmnop"
    assert len(shortened("x" * 99, 28)) == 28
