"""Figures show the measured values at the right places, need no pyplot, and are written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, adapter_stats, inject, plot_adapter, save_adapter, summary
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.report import figures
from lightning_lora.report.depth import places
from lightning_lora.report.updates import measure


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


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


@torch.no_grad()
def dense_rms(model: nn.Module) -> dict[str, float]:
    deltas = {
        name: layer.lora.spec.scaling * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in adapted_layers(model).items()
    }
    return {name: float(delta.square().mean().sqrt()) for name, delta in deltas.items()}


def test_the_root_mean_square_is_a_line_by_depth_for_each_group_and_a_level_for_layers_without_a_number():
    model = blocks()
    figure = plot_adapter(model)["rms"]
    (axes,) = figure.axes
    rms, drawn = dense_rms(model), lines(axes)
    assert legend(axes) == ["q_proj", "up_proj", "head"] == [group.name for group in summary(model).groups]
    for group in ("q_proj", "up_proj"):
        depths, values = drawn[group]
        assert depths == [0, 1, 2]
        assert values == pytest.approx([rms[f"layers.{depth}.{group}"] for depth in depths], rel=1e-6)
    assert drawn["head"] == ([0, 1], pytest.approx([rms["head"]] * 2, rel=1e-6))
    assert axes.get_xlabel() == "layer number; dashed: layers without one"
    assert axes.get_ylabel() == "root mean square of s B A"
    assert figure.get_suptitle().lower().startswith("root mean square of")  # the quantity of the axis
    assert axes.get_ylim()[0] == 0


def test_depths_ascend_whatever_the_order_of_names_in_a_file(tmp_path: Path):
    model = blocks(12, head=False)
    save_adapter(model, tmp_path / "adapter")
    (axes,) = plot_adapter(tmp_path / "adapter")["rms"].axes
    rms = dense_rms(model)
    assert lines(axes)["q_proj"] == ([*range(12)], pytest.approx([rms[f"layers.{i}.q_proj"] for i in range(12)]))
    assert axes.get_xlabel() == "layer number"


def test_several_layers_of_a_group_at_one_depth_are_taken_together():
    experts = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, size) for size in (3, 5))})
    model = nn.ModuleDict({"layers": nn.ModuleList([experts])})
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    rms = dense_rms(model)
    squares = [12 * rms["layers.0.experts.0"] ** 2, 20 * rms["layers.0.experts.1"] ** 2]
    (axes,) = plot_adapter(model)["rms"].axes
    assert lines(axes) == {"experts": ([0], pytest.approx([(sum(squares) / 32) ** 0.5], rel=1e-6))}


def test_lists_of_blocks_with_one_group_have_a_line_each():
    def stack() -> nn.Module:
        return nn.ModuleDict({"block": Blocks(2, head=False).layers})

    model = nn.ModuleDict({"encoder": stack(), "decoder": stack()})
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    (axes,) = plot_adapter(model)["rms"].axes
    assert legend(axes) == ["q_proj (encoder)", "up_proj (encoder)", "q_proj (decoder)", "up_proj (decoder)"]
    assert lines(axes)["q_proj (decoder)"][1] == pytest.approx(
        [dense_rms(model)[f"decoder.block.{depth}.q_proj"] for depth in range(2)], rel=1e-6
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0", "2"], [("layers", 0), ("layers", 2)]),
        (["body.3", "head"], [("body", 3), ("head", None)]),
        (["a.0.q", "a.0.b.1.q", "c.2.q"], [("q (a)", 0), ("q (a)", 0), ("q (c)", 2)]),
        (["a.x.0.q", "a.y.0.q", "b.x.0.q"], [("q (a.x)", 0), ("q (a.y)", 0), ("q (b.x)", 0)]),
        (["", "q"], [("model", None), ("q", None)]),
    ],
)
def test_depth_is_the_first_number_in_a_name_and_lists_are_named_as_far_as_it_takes(names: Any, expected: Any):
    assert places(names) == dict(zip(names, expected, strict=True))


def test_without_s_the_root_mean_square_is_that_of_b_a():
    model = blocks()
    bare = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    (axes,) = plot_adapter(bare)["rms"].axes
    assert axes.get_ylabel() == "root mean square of B A"
    scaling = next(iter(adapted_layers(model).values())).lora.spec.scaling
    expected = [dense_rms(model)[f"layers.{depth}.q_proj"] / scaling for depth in range(3)]
    assert lines(axes)["q_proj"][1] == pytest.approx(expected, rel=1e-6)


def test_an_adapter_that_did_not_move_is_drawn_at_zero():
    found = plot_adapter(blocks(init_lora_weights=True))
    assert lines(found["rms"].axes[0])["q_proj"] == ([0, 1, 2], [0, 0, 0])
    assert {axes.get_title(loc="left").split("\n")[1] for axes in found["spectra"].axes} == {"effective rank 0.0 of 3"}


def test_spectra_show_median_and_range_over_the_layers_of_a_projection():
    model = blocks(5)
    figure = plot_adapter(model)["spectra"]
    updates, stats = measure(model).layers, adapter_stats(model).groups
    for axes, projection in zip(figure.axes, ("q_proj", "up_proj", "head"), strict=True):
        spectra = [each.spectra[0] for name, each in updates.items() if name.endswith(projection)]
        table = np.array([np.array(spectrum) / spectrum[0] for spectrum in spectra])
        rank, line = axes.lines
        np.testing.assert_allclose(line.get_ydata(), np.median(table, 0))
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        assert list(rank.get_xdata()) == pytest.approx([stats[projection].rank] * 2, rel=1e-6)
        corners = axes.collections[0].get_paths()[0].vertices
        for direction in (1, 2, 3):
            column = corners[corners[:, 0] == direction][:, 1]
            assert (column.min(), column.max()) == (table[:, direction - 1].min(), table[:, direction - 1].max())
        assert axes.get_title(loc="left") == f"{projection}\neffective rank {stats[projection].rank:.1f} of 3"


def test_a_factor_that_is_not_finite_is_an_error_that_names_it():
    model = blocks(2, head=False)
    with torch.no_grad():
        model.layers[1]["up_proj"].lora_B[0, 0] = float("nan")
    with pytest.raises(LoRAError, match=r"layers\.1\.up_proj\.lora_B"):
        plot_adapter(model)


@pytest.mark.slow
def test_lines_and_panels_are_those_of_the_groups_with_the_largest_updates():
    """More than there is room for, of which the last moved most and the first least."""
    model = nn.ModuleDict({f"p{i}": nn.Linear(4, 4) for i in range(13)})
    inject(model, LoRAConfig(r=2))
    with torch.no_grad():
        for i, layer in enumerate(adapted_layers(model).values()):
            layer.lora_B.fill_(i + 1)
    figure = plot_adapter(model)["spectra"]
    names = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes]
    assert names == [f"p{i}" for i in range(1, 13)] == legend(plot_adapter(model)["rms"].axes[0])
    assert figure.get_suptitle() == "Singular values of the updates, the 12 largest of 13 groups"


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "begins"), [(".PNG", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_output_is_one_picture_of_all_parts_in_the_form_of_its_suffix(tmp_path: Path, suffix: str, begins: bytes):
    file = tmp_path / f"out{suffix}"
    plot_adapter(blocks(), output=file)
    assert file.read_bytes().startswith(begins)
    assert [*tmp_path.iterdir()] == [file]


# --- what is refused ---


def test_a_suffix_that_is_no_pictures_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(LoRAError, match=r"plot: the output 'a.gif' must end in one of .png, .pdf, .svg\."):
        plot_adapter(tmp_path / "nothing", output=tmp_path / "a.gif")


def test_a_missing_matplotlib_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r"plot_adapter: needs matplotlib; pip install matplotlib\."):
        plot_adapter(blocks())


def test_what_holds_no_adapter_is_refused():
    with pytest.raises(LoRAError, match="holds no lora_A; there is nothing to draw"):
        plot_adapter({"weight": torch.ones(2)})
    with pytest.raises(LoRAError, match="the adapter holds rows of tables alone, which are no low-rank updates"):
        plot_adapter({"embed.lora_rows": torch.ones(1, 3)})
