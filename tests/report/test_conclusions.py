"""Titles of pictures: what each says on both sides of the threshold of its rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_lora.adapter.adapter import Adapter
from lightning_lora.names import cut_at_left, group_of
from lightning_lora.report import conclusions
from lightning_lora.report.layout import Column, arrange, cell_name, cells
from lightning_lora.report.run_log import Statistics, first_not_finite
from lightning_lora.report.updates import Update, Updates

SHAPE = (20, 20)  # by chance, the cosine of two such updates has a deviation of 1/20


def updates(spectra: dict[str, tuple[float, ...]], weight_norm: float | None = 10.0) -> Updates:
    layers = {name: Update(len(values), (values,), (SHAPE,), weight_norm) for name, values in spectra.items()}
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


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ((1.0, 1.0, 2.99), "Updates are alike in size: median rms 0.05, largest q_proj of layer 2, rms 0.15"),
        ((1.0, 1.0, 3.01), "q_proj of layer 2 has the largest update: rms 0.15, 3.01 times the median"),
        ((0.0, 0.0, 1.0), "q_proj of layer 2 has the largest update: rms 0.05; 2 of 3 did not move"),
        ((0.5,), "The update of q_proj of layer 0 has rms 0.025"),
        ((0.0, 0.0), "Nothing has moved: every update is zero"),
        ((1.0, math.nan), "1 update of 2 not finite, first q_proj of layer 1"),
    ],
)
def test_title_of_norms_without_weights_is_of_the_root_mean_square(norms: tuple[float, ...], said: str):
    assert conclusions.on_norms(of_norms(*norms, weight_norm=None)) == said


def test_title_of_norms_does_not_depend_on_sizes_of_layers():
    """A layer four times as wide and high has four times the norm, and moved alike, with weights or without."""
    layers = {
        f"layers.{i}.q_proj": Update(2, ((size, 0.0),), ((20 * size, 20 * size),), 10.0 * size)
        for i, size in enumerate((1, 1, 4))
    }
    found = Updates("run", Adapter({}), layers)
    assert conclusions.on_norms(found).startswith("Layers moved alike: median 10% of their weights")
    without = replace(found, layers={name: replace(each, weight_norm=None) for name, each in layers.items()})
    assert conclusions.on_norms(without).startswith("Updates are alike in size: median rms 0.05")


@pytest.mark.parametrize("weight_norm", [0.0, math.nan, math.inf])
def test_title_of_norms_tells_weights_without_a_share_apart_from_updates_that_are_not_finite(weight_norm: float):
    found = of_norms(1.0, 1.0, 1.0)
    layers = dict(found.layers)
    layers["layers.1.q_proj"] = replace(layers["layers.1.q_proj"], weight_norm=weight_norm)
    title = conclusions.on_norms(replace(found, layers=layers))
    assert title.startswith("Layers moved alike: median 10% of their weights, most q_proj of layer 0, 10%")
    assert title.endswith("; of 1 the weights are zero or not finite") == (weight_norm != math.inf)
    none = conclusions.on_norms(of_norms(1.0, weight_norm=0.0))
    assert none == "All weights are zero or not finite, so nothing tells how far they moved"


def test_title_of_norms_says_what_does_not_count():
    unscaled = replace(of_norms(1.0), scaled=False)
    assert (
        conclusions.on_norms(unscaled) == "q_proj of layer 0 moved by 10% of its weight; without s, which is not stored"
    )
    magnitudes = Adapter({"layers.0.q_proj.lora_magnitude": torch.ones(20)})
    dora = replace(of_norms(1.0), adapter=magnitudes)
    assert conclusions.on_norms(dora) == "q_proj of layer 0 moved by 10% of its weight; scales do not count"
    still = replace(of_norms(0.0), adapter=magnitudes)
    assert conclusions.on_norms(still) == "Every update is zero; scales do not count"


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
    some = replace(one, layers={**one.layers, "b": Update(2, ((3.0, 0.0),), (SHAPE,))})
    assert conclusions.on_spectra(some).startswith("r = 1 to 2 is larger than needed")


def test_title_of_spectra_counts_the_directions_that_there_are_where_the_start_is_subtracted():
    """B @ A - B0 @ A0 has up to twice r, and what is said is of these."""
    found = updates({"q_proj": spectrum(0.9, rank=16)})
    found = replace(found, layers={name: replace(each, rank=8) for name, each in found.layers.items()})
    assert conclusions.on_spectra(found) == "r = 8 fits: 8 of 16 directions hold 90% of the update"
    one = replace(found, layers={"q_proj": Update(1, ((1.0, 1.0),), (SHAPE,))})
    assert conclusions.on_spectra(one).startswith("r = 1 may be too small: 1 of 2 directions hold 50%")


def test_title_of_spectra_never_calls_the_full_rank_too_small():
    small, large = Update(4, (spectrum(0.6),), ((4, 9),)), Update(4, (spectrum(0.6),), (SHAPE,))
    of_all = replace(updates({}), layers={"a": small, "b": small})
    held = "2 of 4 directions hold 60% of the update"
    assert conclusions.on_spectra(of_all) == f"r = 4 cannot be too small, for it is as large as the layers are: {held}"
    of_most = replace(of_all, layers={"a": small, "b": small, "c": large})
    assert "as large as most layers are" in conclusions.on_spectra(of_most)
    of_half = replace(of_all, layers={"a": small, "c": large})
    assert conclusions.on_spectra(of_half).startswith("r = 4 may be too small")


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
    norms = (3.0, 4.0, 0.0, 0.0)
    found = {("q_proj", 0): cosine, ("q_proj", 1): cosine, ("q_proj", 2): math.nan, ("q_proj", 3): -cosine}
    title = conclusions.on_comparison(of_norms(*norms), of_norms(*(2 * norm for norm in norms)), found)
    assert title == f"{said}: median cosine {cosine:.2f}; the second's are 2 times as large"


@pytest.mark.parametrize(
    ("cosines", "side", "said"),
    [
        ((0.07,), 400, "agree slightly"),  # 28 deviations
        ((-0.07,), 400, "are opposed slightly"),
        ((0.07,), 20, "are unrelated"),
        ((0.0094,), 400, "agree slightly"),  # of one cosine: 3 deviations of a median, 1.25 / 400 each
        ((0.0093,), 400, "are unrelated"),
        ((0.0047,) * 4, 400, "agree slightly"),  # four tell it twice as well
        ((0.0046,) * 4, 400, "are unrelated"),
        ((0.0, 0.9, -0.9), 400, "agree in some layers and are opposed in others"),
        ((0.0, 0.0, 0.0, 0.9, -0.9), 400, "are unrelated"),
        ((0.001, 0.9, 0.0009), 400, "are unrelated"),
    ],
)
def test_what_counts_as_unrelated_depends_on_how_many_weights_there_are(cosines: Any, side: int, said: str):
    assert conclusions.relation(cosines, [side * side] * len(cosines)) == said


@pytest.mark.parametrize("shapes", [[(40, 60)], [(40, 60)] * 9, [(16, 16)] * 8 + [(32, 64)] * 4])
def test_random_updates_are_unrelated_and_the_rule_is_not_much_wider_than_needed(shapes: list[tuple[int, int]]):
    generator = torch.Generator().manual_seed(0)

    def updates_of_chance(shape: tuple[int, int], count: int) -> torch.Tensor:
        left = torch.randn(count, shape[0], 2, generator=generator, dtype=torch.float64)
        return (left @ torch.randn(count, 2, shape[1], generator=generator, dtype=torch.float64)).flatten(1)

    count = 400
    each = [torch.cosine_similarity(*(updates_of_chance(shape, count) for _ in range(2)), 1) for shape in shapes]
    sizes = [rows * columns for rows, columns in shapes]
    medians = torch.stack(each).quantile(0.5, 0)
    said = [conclusions.relation(cosines, sizes) for cosines in torch.stack(each, 1).tolist()]
    assert said.count("are unrelated") >= 0.98 * count
    shifted = 5 * float(medians.std())
    said = [conclusions.relation([c + shifted for c in cosines], sizes) for cosines in torch.stack(each, 1).tolist()]
    assert said.count("are unrelated") <= 0.25 * count


def test_a_small_cosine_is_written_with_a_digit():
    big = replace(of_norms(1.0), layers={"layers.0.q_proj": Update(1, ((1.0,),), ((4096, 4096),))})
    title = conclusions.on_comparison(big, big, {("q_proj", 0): 0.0021})
    assert title.startswith("The updates agree slightly: median cosine 0.002;")


def test_title_of_a_comparison_compares_the_sizes_of_shared_layers_alone():
    first, second = of_norms(1.0, 1.0), of_norms(1.0, 1.0, 50.0, math.nan)
    found = {("q_proj", 0): 1.0, ("q_proj", 1): 1.0}
    assert conclusions.on_comparison(first, second, found).endswith("; the second's are 1 times as large")
    found = {("q_proj", 0): 1.0, ("q_proj", 1): math.nan}
    assert conclusions.on_comparison(of_norms(2.0, 0.0), of_norms(1.0, 7.0), found).endswith("are 0.5 times as large")


@pytest.mark.parametrize(
    ("scaled", "said"),
    [
        ((True, True), "; the second's are 1 times as large"),
        ((True, False), "; one of the two does not store s, so nothing tells which are larger"),
        ((False, True), "; one of the two does not store s, so nothing tells which are larger"),
        ((False, False), "; the second's are 1 times as large without s, which neither stores"),
    ],
)
def test_title_of_a_comparison_says_where_s_is_not_known(scaled: tuple[bool, bool], said: str):
    first, second = (replace(of_norms(1.0), scaled=each) for each in scaled)
    assert conclusions.on_comparison(first, second, {("q_proj", 0): 1.0}).endswith(said)


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


def of_points(*points: tuple[float, float]) -> Statistics:
    return Statistics("log", {"norm": {"q_proj": points}})


@pytest.mark.parametrize(
    ("points", "said"),
    [
        # a log that begins at step 1000, as that of a resumed run: its last quarter begins at 1075
        (
            ((1000, 1.0), (1070, 1.0), (1075, 1.5), (1080, 1.5), (1100, 1.5)),
            "have settled: their norms changed by +0.0%",
        ),
        # 75 lies half-way between 50 and 100, and so does what the norm was
        (((0, 1.0), (50, 1.0), (100, 3.0)), "still grow: their norms changed by +50.0%"),
    ],
)
def test_the_last_quarter_of_a_run_is_that_of_the_steps_in_the_log(points: Any, said: str):
    assert conclusions.on_statistics(of_points(*points)).startswith(f"The updates {said} over the last quarter")


def test_two_points_tell_nothing_of_the_last_quarter():
    assert conclusions.on_statistics(of_points((0, 1.0), (100, 9.0))) == "1 statistic over a run, 1 line"


def test_title_of_a_run_names_the_first_value_that_is_not_finite():
    broken = over_a_run(1.0, grad_A=((0.0, 1.0), (50.0, math.nan), (60.0, math.inf)))
    assert conclusions.on_statistics(broken) == "Not finite from step 50 on: grad_A of q_proj"


def test_the_first_value_that_is_not_finite_is_the_earliest_of_all_groups_and_statistics():
    bad = {group: ((40.0, 1.0), (step, math.nan)) for group, step in (("a", 60.0), ("b", 50.0), ("c", 70.0))}
    assert first_not_finite(bad) == ("b", 50.0)
    later = {"norm": {"q": ((0.0, 1.0), (90.0, math.nan))}, "grad_A": bad}
    assert conclusions.on_statistics(Statistics("log", later)) == "Not finite from step 50 on: grad_A of b"


def test_a_value_that_is_not_finite_at_a_single_step_comes_last():
    """As a gradient that overflowed in float16, after which the scaler went on."""
    broken = over_a_run(1.0, grad_A=((0.0, 1.0), (50.0, math.inf), (60.0, 1.0)))
    assert conclusions.on_statistics(broken) == (
        "The updates have settled: their norms changed by +0.0% over the last quarter; not finite at step 50: "
        "grad_A of q_proj"
    )


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
    ((_, column),) = cells([name])
    assert column == depth


def columns_of(names: list[str]) -> list[Column]:
    column = {name: column for (_, column), of_cell in cells(names).items() for name in of_cell}
    return [column[name] for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Segments such as layer1 count where there are several: the 2 of gpt2 is no layer's number.
        (["net1.layer1.conv", "net1.layer2.conv", "head"], [1, 2, None]),
        (["gpt2.h.0.c_attn", "gpt2.h.1.c_attn", "head"], [0, 1, None]),
        # A group in two lists of blocks; two groups that are each in a list of their own.
        (["encoder.block.1.q", "decoder.block.0.q", "head"], ["encoder 1", "decoder 0", None]),
        (["features.0", "features.3", "classifier.0"], [0, 3, 0]),
        # Blocks in blocks, as in a ResNet; experts are taken together, as most groups have none.
        (
            ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "conv1", "fc"],
            ["1.0", "1.1", "2.0", "2.0", None, None],
        ),
        (["l.0.q", "l.0.k", "l.0.experts.0.w", "l.0.experts.1.w", "l.1.experts.0.w"], [0, 0, 0, 0, 1]),
        (["a.0.x.0.fc", "a.1.x.1.fc"], [0, 1]),  # a cell for each without the second number
        (["0.0", "0.1", "1.0"], ["0.0", "0.1", "1.0"]),
    ],
)
def test_columns_tell_blocks_apart_and_name_no_more_than_that_takes(names: list[str], expected: list[Column]):
    assert columns_of(names) == expected


def test_rows_are_the_groups_of_the_summary_and_columns_tell_an_encoder_from_a_decoder():
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.10.layer.0.SelfAttention.q",
        "encoder.block.2.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.2.DenseReluDense.wi",
        "shared",
    ]
    found = cells(names)
    assert [row for row, _ in found] == [group_of(name) for name in names]
    grid = arrange(dict.fromkeys(found, 1.0))
    assert grid.rows == ("SelfAttention.q", "EncDecAttention.q", "DenseReluDense.wi", "shared")
    assert grid.columns == ("encoder 0", "encoder 2", "encoder 10", "decoder 0", None)
    first, *_, last = map(cell_name, found)
    assert (first, last) == ("SelfAttention.q of encoder 0", "shared")


def test_names_of_an_adapter_beside_another_are_arranged_as_with_both():
    encoder, decoder = ["encoder.block.0.q", "encoder.block.1.q"], ["decoder.block.0.q"]
    assert list(cells(encoder)) == [("q", 0), ("q", 1)]
    assert [*cells(encoder, decoder), *cells(decoder, encoder)] == list(cells([*encoder, *decoder]))


def test_a_grid_has_layers_by_number_and_those_without_one_last():
    grid = arrange({("q", 10): 1.0, ("head", None): 2.0, ("q", 2): 3.0})
    assert (grid.rows, grid.columns) == (("q", "head"), (2, 10, None))
    assert grid.values[0][:2] == (3.0, 1.0)
    assert grid.values[1][2] == 2.0
    assert grid.empty == {(0, 2), (1, 0), (1, 1)}


def test_a_grid_of_numbered_layers_alone_has_no_other_column():
    assert arrange({("q", 1): 1.0, ("q", 0): 2.0}).columns == (0, 1)


def test_a_long_name_by_itself_loses_its_beginning():
    assert cut_at_left("short", 10) == "short"
    assert cut_at_left("abcdefghijklmnop", 10) == "...jklmnop"
