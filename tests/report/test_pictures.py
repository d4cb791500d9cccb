"""Figures show the measured values at the right places, need no pyplot, and are written whole."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, plot_adapter, save_adapter
from lightning_lora.nn.adapted_weights import adapted_layers
from lightning_lora.report import pictures
from lightning_lora.report.canvas import ticks
from lightning_lora.report.from_model import updates_of_model
from lightning_lora.report.updates import cosines


class Blocks(nn.Module):
    """`depth` blocks of two projections, and a head."""

    def __init__(self, depth: int = 3, head: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(6, 6), "up_proj": nn.Linear(6, 9)}) for _ in range(depth)
        )
        if head:
            self.head = nn.Linear(6, 4)


def blocks(depth: int = 3, *, seed: int = 1, head: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = Blocks(depth, head)
    inject(model, LoRAConfig(**{"r": 3, "init_lora_weights": False} | options), seed=seed)
    return model


def arrays(axes: Any) -> Any:
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def at(axes: Any, row: str, column: str) -> float:
    """The value that a heat map shows in a row and a column of these names."""
    return float(arrays(axes)[names_of(axes.yaxis).index(row), names_of(axes.xaxis).index(column)])


def names_of(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@torch.no_grad()
def dense_norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {
        name: (
            float((layer.lora.spec.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm()),
            float(layer.adapted_weight().double().norm()),
        )
        for name, layer in adapted_layers(model).items()
    }


def test_heat_map_shows_percent_of_the_weights_by_projection_and_layer_number():
    model = blocks()
    figure = plot_adapter(model)["norms"]
    axes, scale = figure.axes
    shares = {name: 100 * norm / weight for name, (norm, weight) in dense_norms(model).items()}
    shown = arrays(axes)
    for row, projection in enumerate(("q_proj", "up_proj")):
        for depth in range(3):
            assert shown[row, depth] == pytest.approx(shares[f"layers.{depth}.{projection}"], rel=1e-6)
    assert shown[2, 3] == pytest.approx(shares["head"], rel=1e-6)
    assert np.isnan(shown[:2, 3]).all()
    assert np.isnan(shown[2, :3]).all()
    assert not axes.lines  # no cross
    assert names_of(axes.yaxis) == ["q_proj", "up_proj", "head"]
    assert names_of(axes.xaxis) == ["0", "1", "2", "other"]
    assert scale.get_ylabel() == "|s B A| / |W|, %"
    assert axes.images[0].get_cmap().name == "cividis"
    written = sorted(float(text.get_text()) for text in axes.texts)
    assert written == pytest.approx(sorted(shares.values()), rel=0.06)


def test_numbers_in_a_heat_map_are_black_on_light_cells_and_white_on_dark_ones():
    model = blocks()
    with torch.no_grad():
        model.get_parameter("layers.1.q_proj.lora_B").mul_(0.01)
    axes, _ = plot_adapter(model)["norms"].axes
    shown = arrays(axes)
    lightest, darkest = (np.argwhere(shown == value)[0] for value in (np.nanmax(shown), np.nanmin(shown)))
    colours = {(text.get_position()[1], text.get_position()[0]): text.get_color() for text in axes.texts}
    assert (colours[tuple(lightest)], colours[tuple(darkest)]) == ("black", "white")


def with_outlier(depth: int, times: float = 300.0) -> nn.Module:
    model = blocks(depth)
    with torch.no_grad():
        model.get_parameter("layers.1.q_proj.lora_B").mul_(times)
    return model


@pytest.mark.parametrize("depth", [6, 30])
def test_one_outlier_is_marked_and_leaves_the_others_their_colours(depth: int):
    model = with_outlier(depth)
    shares = sorted(100 * norm / weight for norm, weight in dense_norms(model).values())
    axes, scale = plot_adapter(model)["norms"].axes
    image, (end, largest) = axes.images[0], shares[-2:]
    assert image.get_clim() == (0, pytest.approx(end, rel=1e-6))
    colours = {tuple(image.to_rgba(share)) for share in shares}
    assert len(colours) > len(shares) / 2  # with a scale up to the outlier there would be two
    (marked,) = [text for text in axes.texts if "▲" in text.get_text()]
    assert marked.get_position() == (1, 0)  # column and row
    assert axes.get_xlabel() == f"layer number; ▲ beyond the colours, which end at {end:.0f}%: up to {largest:.0f}%"
    assert len(axes.texts) == (1 if depth > 12 else 2 * depth + 1)
    assert scale.get_ylabel() == "|s B A| / |W|, %"


def test_a_layer_that_moved_a_little_more_than_others_has_a_colour_of_the_scale():
    model = blocks(6, head=False)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            layer.lora_B.mul_(
                (1.9 if "1.q" in name else 1.0) * layer.weight.norm() / (layer.lora_B @ layer.lora_A).norm()
            )
    axes, _ = plot_adapter(model)["norms"].axes
    assert axes.images[0].get_clim()[1] == pytest.approx(arrays(axes).max())
    assert axes.get_xlabel() == "layer number"


def test_two_adapters_of_which_one_has_an_outlier_have_one_scale_without_it():
    figure = plot_adapter(with_outlier(4), blocks(4, seed=2))["comparison"]
    upper, middle, lower = figure.axes[:3]
    assert upper.images[0].get_clim() == middle.images[0].get_clim()
    assert upper.images[0].get_clim()[1] < np.nanmax(arrays(upper)) / 100
    assert sum("▲" in text.get_text() for axes in (upper, middle) for text in axes.texts) == 1
    assert "beyond the colours" in middle.get_xlabel()
    assert lower.get_xlabel() == "layer number"


def test_columns_of_an_encoder_and_a_decoder_have_their_names_below():
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"block": Blocks(2, head=False).layers}) for name in ("encoder", "decoder")}
    )
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    figure = plot_adapter(model)["norms"]
    assert names_of(figure.axes[0].yaxis) == ["q_proj", "up_proj"]
    assert names_of(figure.axes[0].xaxis) == ["0", "1", "0", "1"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels(minor=True)] == ["encoder", "decoder"]
    assert " of encoder " in figure.get_suptitle() or " of decoder " in figure.get_suptitle()


def test_adapters_of_other_layers_of_one_model_are_arranged_alike():
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"block": Blocks(2, head=False).layers}) for name in ("encoder", "decoder")}
    )
    inject(whole := copy.deepcopy(model), LoRAConfig(r=2, init_lora_weights=False))
    inject(model, LoRAConfig(r=2, init_lora_weights=False, exclude_modules=r"decoder\..*"))
    upper, middle, lower, *_ = plot_adapter(model, whole)["comparison"].axes
    assert arrays(upper).shape == arrays(middle).shape == arrays(lower).shape == (2, 4)
    assert np.isnan(arrays(upper)[:, 2:]).all()
    assert not np.isnan(arrays(middle)).any()


def test_layers_without_numbers_have_no_scale_of_numbers():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    axes = plot_adapter(model)["norms"].axes[0]
    assert (names_of(axes.xaxis), axes.get_xlabel()) == ([], "")


def test_pictures_in_files_let_the_page_show_through_and_figures_for_loggers_are_white(tmp_path: Path):
    file = tmp_path / "out.png"
    figure = plot_adapter(blocks(), output=file)["norms"]
    assert Image.open(file).getpixel((0, 0))[3] == 0
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_text_beside_cells_is_of_a_grey_with_the_same_contrast_to_white_and_to_a_dark_page():
    for figure in plot_adapter(blocks()).values():
        in_cells = {text for axes in figure.axes for text in axes.texts}
        beside = [text for text in figure.findobj(Text) if text.get_text() and text not in in_cells]
        assert {text.get_color() for text in beside} == {"#7a7a7a"}


def test_heat_map_of_a_file_is_of_the_root_mean_square_and_says_so(tmp_path: Path):
    model = blocks()
    save_adapter(model, tmp_path / "adapter")
    axes, scale = plot_adapter(tmp_path / "adapter")["norms"].axes
    assert scale.get_ylabel() == "rms of s B A"
    assert axes.get_title(loc="right") == "of the updates alone; with the base, shares of its weights"
    assert at(axes, "q_proj", "1") == pytest.approx(dense_norms(model)["layers.1.q_proj"][0] / 6, rel=1e-6)
    bare = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    axes, scale = plot_adapter(bare)["norms"].axes
    assert scale.get_ylabel() == "rms of B A"
    scaling = next(iter(adapted_layers(model).values())).lora.spec.scaling
    expected = dense_norms(model)["layers.1.q_proj"][0] / 6 / scaling
    assert at(axes, "q_proj", "1") == pytest.approx(expected, rel=1e-6)


def test_spectra_show_median_and_range_over_the_layers_of_a_projection():
    model = blocks(5)
    figure = plot_adapter(model)["spectra"]
    updates = updates_of_model(model).layers
    for axes, projection in zip(figure.axes, ("q_proj", "up_proj", "head"), strict=True):
        spectra = [each.spectra[0] for name, each in updates.items() if name.endswith(projection)]
        table = np.array([np.array(spectrum) / spectrum[0] for spectrum in spectra])
        line, half = axes.lines
        np.testing.assert_allclose(line.get_ydata(), np.median(table, 0))
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        assert list(half.get_xdata()) == [2.5, 2.5]
        corners = axes.collections[0].get_paths()[0].vertices
        for direction in (1, 2, 3):
            column = corners[corners[:, 0] == direction][:, 1]
            assert (column.min(), column.max()) == (table[:, direction - 1].min(), table[:, direction - 1].max())
        assert axes.get_title(loc="left").startswith(f"{projection}\n2 of 3 hold ")


def test_titles_are_the_conclusions_from_the_same_numbers():
    model = blocks(init_lora_weights=True)  # B = 0
    found = plot_adapter(model)
    assert found["norms"].get_suptitle() == "Nothing has moved: every update is zero"
    assert found["spectra"].get_suptitle().startswith("r = 3: the updates are zero or not finite")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B[:, :1].fill_(0.1)  # of rank 1
    found = plot_adapter(model)
    assert found["norms"].get_suptitle().startswith("Layers moved alike: median ")
    assert found["spectra"].get_suptitle() == (
        "r = 3 is larger than needed: 2 of 3 directions hold over 99.9% of the update"
    )


def test_a_layer_that_is_not_finite_is_crossed_and_named():
    model = blocks(2, head=False)
    with torch.no_grad():
        model.layers[1]["up_proj"].lora_B[0, 0] = float("nan")
    found = plot_adapter(model)
    axes = found["norms"].axes[0]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == [(1, 1)]
    assert np.isnan(arrays(axes)[1, 1])
    assert found["norms"].get_suptitle() == "1 update of 4 not finite, first up_proj of layer 1"


def test_two_adapters_are_shown_on_one_scale_with_the_cosines_between_them(tmp_path: Path):
    first, second = blocks(), blocks(seed=2, lora_alpha=30)
    save_adapter(second, tmp_path / "second")
    save_adapter(first, tmp_path / "first")
    figure = plot_adapter(tmp_path / "first", tmp_path / "second")["comparison"]
    upper, middle, lower = figure.axes[:3]
    for axes, model in ((upper, first), (middle, second)):
        rms = dense_norms(model)["layers.2.up_proj"][0] / (6 * 9) ** 0.5
        assert at(axes, "up_proj", "2") == pytest.approx(rms, rel=1e-6)
    assert upper.images[0].get_clim() == middle.images[0].get_clim()
    assert upper.images[0].get_clim()[1] == max(np.nanmax(arrays(axes)) for axes in (upper, middle))
    expected = cosines(updates_of_model(first), updates_of_model(second))
    assert at(lower, "q_proj", "1") == pytest.approx(expected["q_proj", 1], abs=1e-6)
    assert at(lower, "head", "other") == pytest.approx(expected["head", None], abs=1e-6)
    assert lower.images[0].get_clim() == (-1, 1)
    assert upper.get_title(loc="left").endswith("/first")
    assert middle.get_title(loc="left").endswith("/second")


@pytest.mark.parametrize("model_is_first", [True, False])
def test_norms_are_relative_where_those_of_both_weights_are_known(tmp_path: Path, model_is_first: bool):
    model = blocks()
    save_adapter(model, tmp_path / "adapter")
    pair = (model, tmp_path / "adapter") if model_is_first else (tmp_path / "adapter", model)
    upper, middle, _, scale, _ = plot_adapter(*pair)["comparison"].axes
    assert scale.get_ylabel() == "rms of s B A"
    np.testing.assert_allclose(arrays(upper), arrays(middle), rtol=1e-6)
    scale = plot_adapter(model, model)["comparison"].axes[3]
    assert scale.get_ylabel() == "|s B A| / |W|, %"


def test_the_same_adapter_is_alike_in_size_with_its_base_and_without(tmp_path: Path):
    """Of weights with one deviation, in layers of which one is many times as large as the others."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(*size) for size in ((8, 8), (8, 8), (80, 160)))})
    inject(model, LoRAConfig(r=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.weight.normal_()
            for factor in (layer.lora_A, layer.lora_B):
                factor.normal_()
    save_adapter(model, tmp_path / "adapter")
    live, file = (plot_adapter(source)["norms"].get_suptitle() for source in (model, tmp_path / "adapter"))
    assert live.startswith("Layers moved alike")
    assert file.startswith("Updates are alike in size")


def test_the_title_of_pissas_spectra_counts_the_directions_that_its_panels_count():
    model = blocks(init_lora_weights="pissa", r=2)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B += 0.01 * torch.randn_like(layer.lora_B)
            layer.lora_A += 0.01 * torch.randn_like(layer.lora_A)
    figure = plot_adapter(model)["spectra"]
    assert "2 of 4 directions hold" in figure.get_suptitle()
    assert {axes.get_title(loc="left").split("\n")[1][:11] for axes in figure.axes} == {"2 of 4 hold"}


def test_panels_are_those_of_the_projections_with_the_largest_updates():
    """More than there is room for, of which the last moved most and the first least."""
    model = nn.ModuleDict({f"p{i}": nn.Linear(4, 4) for i in range(13)})
    inject(model, LoRAConfig(r=2))
    with torch.no_grad():
        for i, layer in enumerate(adapted_layers(model).values()):
            layer.lora_B.fill_(i + 1)
    figure = plot_adapter(model)["spectra"]
    names = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes]
    assert names == [f"p{i}" for i in range(1, 13)]
    assert "the 12 largest of 13 projections" in figure.get_supxlabel()


def test_a_file_and_the_model_it_is_from_point_the_same_way(tmp_path: Path):
    model = blocks()
    save_adapter(model, tmp_path / "adapter")
    figure = plot_adapter(tmp_path / "adapter", model)["comparison"]
    assert (
        figure.get_suptitle() == "The updates point the same way: median cosine 1.00; the second's are 1 times as large"
    )


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")]
)
def test_the_output_is_one_picture_of_all_parts_in_the_form_of_its_suffix(tmp_path: Path, suffix: str, begins: bytes):
    file = tmp_path / f"out{suffix}"
    plot_adapter(blocks(), output=file)
    assert file.read_bytes().startswith(begins)
    assert [*tmp_path.iterdir()] == [file]


def test_what_was_there_stays_where_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning_lora.report import canvas

    file = tmp_path / "out.png"
    file.write_text("earlier")

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no space left")

    monkeypatch.setattr(canvas.Figure, "savefig", fails)
    with pytest.raises(RuntimeError, match="no space left"):
        plot_adapter(blocks(), output=file)
    assert file.read_text() == "earlier"
    assert [*tmp_path.iterdir()] == [file]


def test_nothing_drawn_lies_outside_the_picture_or_over_something_else():
    """Titles, names beside axes and the texts in cells of a large and of a narrow adapter with long names."""

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = [f"a_rather_long_name_{letter}_of_a_projection" for letter in "abc"]
            self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(3, 3) for n in names}) for _ in range(2))

    long = Long()
    inject(long, LoRAConfig(r=2, init_lora_weights=False))
    stacks = nn.ModuleDict({name: Blocks(30, head=False) for name in ("a_long_name_of_a_stack", "another_stack")})
    inject(stacks, LoRAConfig(r=2, init_lora_weights=False))
    for model in (blocks(80), blocks(1), long, with_outlier(33), stacks):
        for figure in plot_adapter(model).values():
            figure.draw_without_rendering()
            renderer = figure._get_renderer()
            drawn, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
            assert drawn.x0 >= -0.01
            assert drawn.y0 >= -0.01
            assert drawn.x1 <= width + 0.01
            assert drawn.y1 <= height + 0.01
            for axes in figure.axes:
                for minor in (False, True):
                    texts = (text for text in axes.get_xticklabels(minor=minor) if text.get_text())
                    shown = [text.get_window_extent(renderer) for text in texts]
                    assert not any(one.overlaps(other) for one, other in itertools.pairwise(shown))


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (16, 16), (17, 9), (80, 16), (126, 16)])
def test_an_axis_has_at_most_sixteen_labels(count: int, shown: int):
    assert len(ticks(count)) == shown


def test_the_users_style_changes_nothing():
    import matplotlib

    plain = plot_adapter(blocks())["norms"]
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30}):
        styled = plot_adapter(blocks())["norms"]
    assert styled.get_facecolor() == plain.get_facecolor()
    assert styled.axes[0].yaxis.get_ticklabels()[0].get_size() == plain.axes[0].yaxis.get_ticklabels()[0].get_size()


# --- what is refused ---


def test_a_suffix_that_is_no_pictures_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(LoRAError, match=r"plot: the output 'a.gif' must end in one of .png, .pdf, .svg\."):
        plot_adapter(tmp_path / "nothing", output=tmp_path / "a.gif")


def test_a_missing_matplotlib_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r"plot_adapter: needs matplotlib; pip install matplotlib\."):
        plot_adapter(blocks())


def test_adapters_without_a_layer_in_common_are_refused():
    other = nn.ModuleDict({"out": nn.Linear(2, 2)})
    inject(other, LoRAConfig(r=1))
    with pytest.raises(
        LoRAError, match=r"plot: Blocks and ModuleDict have no layer in common; .* two adapters of one model"
    ):
        plot_adapter(blocks(), other)


def test_what_holds_no_adapter_is_refused(tmp_path: Path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    with pytest.raises(LoRAError, match=r"plot: .*plain.pt holds no lora_A; there is nothing to draw\."):
        plot_adapter(tmp_path / "plain.pt")
    with pytest.raises(LoRAError, match="a state dict holds rows of tables alone, which are no low-rank updates"):
        plot_adapter({"embed.lora_rows": torch.ones(1, 3)})


def test_a_base_beside_a_model_is_refused(tmp_path: Path):
    with pytest.raises(LoRAError, match="base is for adapters in files; a model has its own weights"):
        plot_adapter(blocks(), base=tmp_path)


# --- matplotlib's state ---


@pytest.mark.slow
def test_neither_the_package_nor_its_figures_import_pyplot(tmp_path: Path):
    program = f"""
import sys, torch, lightning_lora
from lightning_lora.command.main import main
assert "matplotlib" not in sys.modules
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
lightning_lora.inject(net, lightning_lora.LoRAConfig(r=2))
lightning_lora.plot_adapter(net, output="{tmp_path}/out.png")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
