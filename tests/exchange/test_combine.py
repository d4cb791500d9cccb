"""combine against float64 sums of exact changes, and against peft's add_weighted_adapter where peft is right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    export_adapter,
    inject,
    load_adapter,
    merged_state_dict,
    save_adapter,
)
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.adapter.combined_layer import PRUNING
from lightning_lora.exchange.combine import combine_adapters
from support.covering import covering
from support.models.networks import bits, checkpoint
from support.models.parameters import Experts
from support.models.peers import close, config_of, edit, logits, ours, read_by_peft, theirs
from support.runs.notices import quiet_peers

pytestmark = quiet_peers

Deltas = dict[str, torch.Tensor]


class Kinds(nn.Module):
    """A layer of each kind; its forward does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv1d = Conv1D(5, 6)
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.qkv = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(6, 2)
        self.apart = nn.MultiheadAttention(6, 2, kdim=4, vdim=3)
        self.lstm = nn.LSTM(4, 5)
        self.mix = Experts()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)


LAYERS = ["linear", "conv1d", "embed", "conv", "grouped", "qkv", "attention", "attention.out_proj", "apart"]
BASE: dict[str, Any] = {
    "target_modules": LAYERS,
    "target_parameters": ["weight_ih_l0", *[name for name, p in Experts().named_parameters() if p.dim() == 3]],
    "enable_lora": {"qkv": [True, False, True]},
}
FIRST: dict[str, Any] = {"r": 2, "lora_alpha": 3, **BASE}
SECOND: dict[str, Any] = {
    **BASE,
    "r": 3,
    "lora_alpha": 2,
    "use_rslora": True,
    "rank_pattern": {"conv": 1, "weight_ih_l0": 4},
    "alpha_pattern": {"embed": 5},
}


def kinds() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Kinds().double()


def adapted(seed: int, build: Any = kinds, **options: Any) -> nn.Module:
    """The same base, with random values in what is trained."""
    net: nn.Module = build()
    inject(net, LoRAConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return net


def deltas_of(net: nn.Module, build: Any = kinds) -> Deltas:
    """What the adapter changes of each base weight, in float64."""
    base = build().state_dict()
    return {name: value.double() - base[name].double() for name, value in merged_state_dict(net).items()}


def loaded(state: Any, build: Any = kinds) -> nn.Module:
    net: nn.Module = build()
    load_adapter(net, state)
    return net


def total(weighted: list[tuple[float, Deltas]]) -> Deltas:
    names = weighted[0][1]
    return {name: sum((w * each[name] for w, each in weighted), torch.zeros(())) for name in names}  # type: ignore[misc]


def assert_deltas(found: Deltas, expected: Deltas, atol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def states(*nets: nn.Module) -> list[dict[str, Any]]:
    return [checkpoint(net, "adapter") for net in nets]


# --- exact methods, of every kind of layer, against float64 ---


@pytest.mark.parametrize(("method", "weights"), [("linear", (0.7, 0.3)), ("cat", (1.5, -2.0))])
def test_the_sum_of_other_ranks_and_scalings_is_exact_for_every_kind(method: str, weights: tuple[float, float]):
    one, other = adapted(2, **FIRST), adapted(3, **SECOND)
    result = loaded(combine(states(one, other), weights, method=method))
    expected = total(list(zip(weights, map(deltas_of, (one, other)), strict=True)))
    changed = {name for name, delta in expected.items() if delta.any()}
    assert len(changed) == 15  # each layer's and parameter's weight; of `apart` three, and its out_proj
    assert_deltas(deltas_of(result), expected)


@pytest.mark.parametrize("parts", [[True, True, False], None])
def test_parts_of_a_fused_projection_become_one_plain_adapter(parts: list[bool] | None):
    one = adapted(2, r=2, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]})
    other = adapted(3, r=1, target_modules=["qkv"], enable_lora=parts and {"qkv": parts})
    state = combine(states(one, other), [1.0, -0.5])
    assert state.config is not None
    assert not state.config.enable_lora
    assert_deltas(deltas_of(loaded(state)), total([(1.0, deltas_of(one)), (-0.5, deltas_of(other))]))


# --- weights ---


def small(seed: int, **options: Any) -> nn.Module:
    return adapted(seed, **{"r": 2, "target_modules": ["linear", "conv", "embed"], **options})


@pytest.mark.parametrize(
    ("others", "weights", "method", "rank"),
    [
        ([2], [0.5, 0.5], "linear", 2),  # one adapter twice
        ([2], [0.5, 0.5], "cat", 4),
        ([3], [1e-10, 1e-10], "linear", 4),  # whatever the size
        ([3], [1e10, 1e10], "linear", 4),
        ([3], [1.0, 0.0], "cat", 2),  # of weight zero
        ([], [-2.5], "svd", 2),
        ([], [-2.5], "cat", 2),
    ],
    ids=str,
)
def test_a_sum_has_the_lowest_rank_that_holds_it(others: list[int], weights: list[float], method: str, rank: int):
    nets = [small(seed, lora_alpha=3, use_rslora=seed == 2, lora_dropout=0.1) for seed in (2, *others)]
    combined = combine(states(*nets), weights, method=method)
    result = loaded(combined)
    expected = total(list(zip(weights, map(deltas_of, nets), strict=True)))
    assert_deltas(deltas_of(result), expected, atol=1e-12 * max(1, *map(abs, weights)))
    assert result.get_parameter("linear.lora_A").shape[0] == rank
    assert combined.config is not None
    assert combined.config.target_modules == ("linear", "conv", "embed")
    assert combined.config.lora_dropout == 0.1


def test_changes_that_cancel_or_were_not_trained_leave_zeros():
    (state,) = states(small(2))
    assert all(delta.abs().max() < 1e-14 for delta in deltas_of(loaded(combine([state, state], [1.0, -1.0]))).values())
    inject(net := kinds(), LoRAConfig(r=2, target_modules=["linear"]))
    result = combine(states(net), [1.0])
    assert result.tensors["linear.lora_A"].shape == (2, 6)
    assert not any(delta.any() for delta in deltas_of(loaded(result)).values())


# --- svd and pruning ---


@pytest.mark.parametrize("rank", [None, 1])
def test_svd_is_the_best_of_its_rank(rank: int | None):
    one, other = small(2), small(3, r=3)
    combined = combine_adapters(states(one, other), [0.7, 0.3], method="svd", rank=rank)
    result = loaded(combine(states(one, other), [0.7, 0.3], method="svd", rank=rank))
    exact = total([(0.7, deltas_of(one)), (0.3, deltas_of(other))])
    found = deltas_of(result)
    for layer in ("linear", "conv", "embed"):
        matrix = exact[f"{layer}.weight"].flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        r = rank or 3
        best = (u[:, :r] * s[:r]) @ vh[:r]
        torch.testing.assert_close(found[f"{layer}.weight"].flatten(1), best, rtol=0, atol=1e-12)
        share = float(s[:r].square().sum() / s.square().sum())
        assert combined.kept[layer] == pytest.approx(share)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999999])
def test_a_rank_that_is_a_share_is_each_layers_lowest_that_keeps_it_and_the_options_say_which(share: float):
    net = small(6, r=5)
    found = combine(states(net), rank=share)
    ranks = {}
    for layer in ("linear", "conv", "embed"):
        energy = torch.linalg.svdvals(deltas_of(net)[f"{layer}.weight"].flatten(1)).square()
        ranks[layer] = next(r for r in range(1, 6) if energy[:r].sum() >= share * energy.sum())
    assert {name: layer.r for name, layer in found.layers.items()} == ranks
    assert share != 0.9 or len(set(ranks.values())) > 1
    assert {name: found.config.rank(name) for name in ranks} == ranks
    whole = combine_adapters(states(net), [1.0], method="svd", rank=share)
    assert all(kept >= share for kept in whole.kept.values())


def test_a_stack_keeps_the_share_in_each_matrix_and_an_empty_change_has_rank_1():
    experts = [name for name, p in Experts().named_parameters() if p.dim() == 3]
    stack = adapted(3, r=3, target_modules=[], target_parameters=experts)
    for share in (0.5, 0.9):
        shrunk = combine(states(stack), rank=share)
        before, after = deltas_of(stack), deltas_of(loaded(shrunk))
        for name in (f"mix.{expert}" for expert in experts):
            for matrix, kept in zip(before[name], after[name], strict=True):
                assert kept.square().sum() >= share * matrix.square().sum() - 1e-6
            assert shrunk.layers[name].r <= 3
    nothing = small(2)
    for name, factor in nothing.named_parameters():
        factor.data *= 0 if name.endswith("lora_B") else 1
    assert {layer.r for layer in combine(states(nothing), rank=0.5).layers.values()} == {1}


PEFT_METHODS = {
    "cat": {},
    "svd": {},
    "ties_svd": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.4},
}
PEERS = {
    "llama": {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "rank_pattern": {}, "alpha_pattern": {}},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "use_rslora": False},
}


@pytest.mark.parametrize(
    ("method", "name", "weights"), covering(PEFT_METHODS, PEERS, [(0.7, 0.3), (1.2, -0.4)], meet=1)
)
def test_equal_ranks_give_what_pefts_add_weighted_adapter_gives(
    tmp_path: Path, method: str, name: str, weights: tuple[float, float]
):
    for folder, seed in (("a", 5), ("b", 6)):
        net = theirs(name, **PEERS[name])
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in net.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        net.save_pretrained(str(tmp_path / folder))
    combine([tmp_path / "a", tmp_path / "b"], weights, method=method, output=tmp_path / "c", **PEFT_METHODS[method])
    peft = read_by_peft(name, tmp_path / "a")
    peft.load_adapter(str(tmp_path / "b"), "b")
    base: Any = peft.base_model
    base.add_weighted_adapter(["default", "b"], list(weights), "both", combination_type=method, **PEFT_METHODS[method])
    peft.set_adapter("both")
    ours = read_by_peft(name, tmp_path / "c")
    close(logits(ours), logits(peft))
    both = dict(peft.named_modules())
    compared = 0
    for key, module in ours.named_modules():
        if hasattr(module, "get_delta_weight"):
            close(module.get_delta_weight("default"), both[key].get_delta_weight("both"))  # type: ignore[operator]
            compared += 1
    assert compared >= 3
    assert config_of(tmp_path / "c")["lora_alpha"] == config_of(tmp_path / "c")["r"]


def test_dare_is_drawn_from_the_seed_and_layer_and_not_from_the_users_stream():
    given = states(small(2), small(3))

    def run(seed: int) -> dict[str, bytes]:
        before = torch.get_rng_state()
        state = combine(given, [1, 1], method="dare_linear", density=0.5, seed=seed, rank=5)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: bits(tensor) for name, tensor in state.tensors.items()}

    assert run(0) == run(0) != run(1)


def same_tensors(found: Adapter, expected: Adapter) -> bool:
    return found.tensors.keys() == expected.tensors.keys() and all(
        torch.equal(value, expected.tensors[name]) for name, value in found.tensors.items()
    )


def test_dare_is_the_sum_of_what_it_leaves_under_each_of_its_names_and_density_that_is_left_out_is_a_half():
    given = states(small(2), small(3))
    expected = combine(given, [1, 2], method="dare_linear", density=0.5)
    for name in ("dare", "dare_svd", "dare_linear_svd"):
        assert same_tensors(combine(given, [1, 2], method=name, density=0.5), expected)
    assert not same_tensors(combine(given, [1, 2], method="dare", density=0.9), expected)
    for method in PRUNING:
        assert same_tensors(combine(given, [1, 2], method=method), combine(given, [1, 2], method=method, density=0.5))


# --- what is trained whole ---


def test_what_is_trained_whole_is_the_weighted_mean_and_said(caplog):
    options: dict[str, Any] = {"r": 2, "target_modules": ["linear"], "modules_to_save": ["head"], "bias": "lora_only"}
    one, other = adapted(2, **options), adapted(3, **options)
    with torch.no_grad():
        other.get_buffer("norm.running_mean").fill_(4)
        other.get_buffer("norm.num_batches_tracked").fill_(7)
    with caplog.at_level(logging.INFO, "lightning_lora"):
        state = combine(states(one, other), [3.0, 1.0])
    result = loaded(state)
    for name in ("head.weight", "head.bias", "linear.bias"):
        expected = 0.75 * one.get_parameter(name) + 0.25 * other.get_parameter(name)
        torch.testing.assert_close(result.get_parameter(name), expected)
    assert result.get_buffer("norm.running_mean").tolist() == [1.0] * 6
    assert result.get_buffer("norm.num_batches_tracked") == 7
    assert "weighted means of linear.bias, " in caplog.text


def test_rows_of_embeddings_are_the_weighted_mean(tmp_path: Path):
    def tied() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = nn.ModuleDict(
                {"emb": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)}
            )
        net["head"].weight = net["emb"].weight
        return net

    options: dict[str, Any] = {"r": 2, "target_modules": ["body"], "trainable_token_indices": {"emb": [2, 5]}}
    one, other = (adapted(seed, tied, **options) for seed in (2, 3))
    result = loaded(combine(states(one, other), [0.5, 1.5]), tied)
    expected = 0.25 * one.get_parameter("emb.lora_rows") + 0.75 * other.get_parameter("emb.lora_rows")
    torch.testing.assert_close(result.get_parameter("emb.lora_rows"), expected)
    assert result.get_submodule("head").lora_rows is result.get_submodule("emb").lora_rows
    third = adapted(4, tied, **options | {"trainable_token_indices": {"emb": [2, 6]}})
    with pytest.raises(LoRAError, match=r"list of trained rows is .*\(2, 5\).* in adapters\[0\] and .*\(2, 6\)"):
        combine(states(one, third), [1, 1])


# --- what does not go together ---


def test_adapters_of_other_bases_are_refused_or_warned_of():
    def moved() -> nn.Module:
        net = kinds()
        with torch.no_grad():
            net.get_parameter("conv.weight").mul_(1.1)
        return net

    options: dict[str, Any] = {"r": 2, "target_modules": ["linear"]}
    given = states(adapted(2, **options), adapted(3, moved, **options))
    with pytest.raises(
        LoRAError, match=r"another base: values of 'conv.weight' .*adapters\[0\] and adapters\[1\] differ"
    ):
        combine(given, [1, 1])
    with pytest.warns(UserWarning, match="another base: values of 'conv.weight'") as caught:
        combine(given, [1, 1], strict_base=False)
    assert caught[0].filename == __file__


def test_adapters_whose_folders_name_other_bases_are_combined_with_a_warning(tmp_path: Path):
    """PEFT's folders have no fingerprint; where one names no base, nothing is compared."""
    names = {"a": "some/base", "b": "other/base", "c": None, "d": "some/base"}
    for folder, base in names.items():
        theirs("llama", tmp_path / folder)
        edit(tmp_path / folder, base_model_name_or_path=base)
    with pytest.warns(UserWarning, match=r"combine: .*a is of the base 'some/base', .*b of 'other/base'\.") as caught:
        combine([tmp_path / "a", tmp_path / "b"], [1, 1])
    assert caught[0].filename == __file__
    for other in ("c", "d"):
        combine([tmp_path / "a", tmp_path / other], [1, 1])


def other_model() -> list[Any]:
    inject(other := nn.Sequential(nn.Linear(6, 5)), LoRAConfig(r=2, target_modules=["0"]))
    return states(small(2), other)


def other_shape() -> list[Any]:
    given = states(small(2), small(3))
    given[1]["state_dict"]["linear.lora_B"] = torch.ones(4, 2)
    return given


def other_tensor() -> list[Any]:
    given = states(small(2))
    given[0]["state_dict"]["linear.lora_scale"] = torch.ones(5)
    return given


def other_variance() -> list[Any]:
    (one, other) = (small(2), small(3))
    other.get_buffer("norm.running_var").fill_(9)
    return states(one, other)


def heads(number: int) -> list[Any]:
    return states(*(small(seed, modules_to_save=["head"]) for seed in range(number)))


REFUSED: dict[str, tuple[Any, list[float], str]] = {
    "another model": (other_model, [1, 1], r"are of other models: .*'0\.weight'"),
    "another shape": (other_shape, [1, 1], r"the shape of 'linear' is .* in adapters\[0\] and .* in adapters\[1\]"),
    "no A or B": (other_tensor, [1], r"'linear.lora_scale' cannot be combined"),
    "trained whole in one": (lambda: states(small(2)) + heads(1), [1, 1], r"'head.weight' was fully trained in"),
    "a sum of zero": (lambda: heads(2), [1, -1], r"weights sum up to 0, so 'head.weight'"),
    "a sum of rounding": (lambda: heads(3), [0.1, 0.2, -0.3], r"weights sum up to 0, so 'head.weight'"),
    "a negative variance": (other_variance, [2, -1], r"variances in 'norm.running_var' negative"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_go_together_are_refused_by_what_differs(case: str):
    given, weights, message = REFUSED[case]
    with pytest.raises(LoRAError, match=message):
        combine(given(), weights)


@pytest.mark.parametrize(
    ("weights", "options", "complaint"),
    [
        ([1.0], {}, "2 adapters need as many weights, found 1"),
        ([1.0, float("nan")], {}, "a strength must be a finite number, but it is nan"),
        ([0, 0.0], {}, "all weights are 0"),
        ([1, 1], {"method": "slerp"}, "method must be one of linear, cat, svd, .* but it is 'slerp'"),
        ([1, 1], {"method": "linear", "rank": 4}, "linear has no rank to choose"),
        ([1, 1], {"method": "svd", "rank": 0}, "rank must be a whole number of at least 1"),
        ([1, 1], {"rank": 1.0}, "or a share of the squared singular values above 0 and below 1, but it is 1.0"),
        ([1, 1], {"method": "ties", "rank": 0.9}, r"a rank that is a share \(0\.9\) is for svd; give ties a whole"),
        (None, {}, "weights must be a list with a number for each adapter"),
        ([1, 1], {"method": "svd", "density": 0.5}, "density, the share of values to keep, is only for"),
        ([1, 1], {"method": "ties", "density": 0}, "density must be above 0 and at most 1"),
        ([1.0, np.bool_(True)], {}, "a strength must be a finite number"),
        (0.7, {}, "weights must be a list"),
    ],
)
def test_an_argument_that_is_not_allowed_is_refused(weights: Any, options: dict[str, Any], complaint: str):
    with pytest.raises(LoRAError, match=complaint):
        combine(states(small(2), small(3)), weights, **options)
    for nothing in ([], "folder", {}):
        with pytest.raises(LoRAError, match="expected a list of one adapter or more"):
            combine(nothing, [1])  # type: ignore[arg-type]


# --- what comes out ---


def test_sources_of_any_form_go_together_and_the_result_goes_wherever_an_adapter_goes(tmp_path: Path):
    """Its folder names the layers of all, although the options are those of the first."""
    nets = [small(2, target_modules=["linear"], lora_dropout=0.1)]
    nets.append(small(3, target_modules=["conv"], target_parameters=["weight_ih_l0"]))
    nets.append(small(4, target_modules=["linear", "conv"]))
    save_adapter(nets[0], tmp_path / "a")
    torch.save(checkpoint(nets[1], "merged"), tmp_path / "b.ckpt")
    given = [tmp_path / "a", str(tmp_path / "b.ckpt"), checkpoint(nets[2], "full")]
    result = combine(given, [1, 2, 3], output=tmp_path / "c")
    save_adapter(result, tmp_path / "saved")
    export_adapter(result, tmp_path / "exported")
    expected = total([(w, deltas_of(net)) for w, net in zip((1, 2, 3), nets, strict=True)])
    for source in (result, combine([result], [1.0]), tmp_path / "c", tmp_path / "saved", tmp_path / "exported"):
        assert_deltas(deltas_of(loaded(source)), expected, atol=1e-12 if source is result else 1e-6)
    assert set(config_of(tmp_path / "c")["target_modules"]) == {"linear", "conv"}
    assert config_of(tmp_path / "c")["target_parameters"] == ["lstm.weight_ih_l0"]
    assert config_of(tmp_path / "c")["lora_dropout"] == 0  # which single parameters do not allow


def test_adapters_of_16_bits_are_combined_in_float32_and_those_of_float64_in_float64():
    def half() -> nn.Module:
        return kinds().bfloat16()

    options: dict[str, Any] = {"r": 2, "target_modules": ["linear"], "autocast_adapter_dtype": False}
    given = states(*(adapted(seed, half, **options) for seed in (2, 3)))
    assert given[0]["state_dict"]["linear.lora_A"].dtype == torch.bfloat16
    assert combine(given, [0.5, 0.5]).tensors["linear.lora_A"].dtype == torch.float32
    nets = [adapted(seed, **options) for seed in (2, 3)]
    state = combine(states(*nets), [0.3, 0.7], method="magnitude_prune", density=1.0, rank=4)  # which prunes nothing
    assert state.tensors["linear.lora_A"].dtype == torch.float64
    assert_deltas(deltas_of(loaded(state)), total(list(zip([0.3, 0.7], map(deltas_of, nets), strict=True))))


def test_attention_keeps_one_rank_for_all_of_it_as_peft_needs(tmp_path: Path):
    """Where the changes of in_proj add up to a lower rank than those of out_proj."""
    one, other = (adapted(seed, r=2, target_modules=["attention"]) for seed in (2, 3))
    for leaf in ("attention.lora_A", "attention.lora_B"):
        other.get_parameter(leaf).data.copy_(one.get_parameter(leaf))
    state = combine(states(one, other), [1, 1], output=tmp_path / "c")
    assert len(state.tensors["attention.lora_A"]) == len(state.tensors["attention.out_proj.lora_A"]) == 4
    assert_deltas(deltas_of(loaded(state)), total([(1.0, deltas_of(one)), (1.0, deltas_of(other))]))
    options: dict[str, Any] = {"enable_lora": {"attention": [True, False, True]}, "rank_pattern": {"out_proj": 3}}
    parts = adapted(2, r=1, target_modules=["attention", "attention.out_proj"], **options)
    state = combine(states(parts), [0.5])
    assert len(state.tensors["attention.lora_A"]) == len(state.tensors["attention.out_proj.lora_A"]) == 3
    assert_deltas(deltas_of(loaded(state)), total([(0.5, deltas_of(parts))]))


def test_a_combination_is_complete_where_all_are(tmp_path: Path):
    ours("llama", tmp_path / "ours")
    theirs("llama", tmp_path / "theirs")
    given = [tmp_path / "ours", tmp_path / "theirs"]
    assert not combine(given, [1, 1]).complete
    assert not combine(given[::-1], [1, 1]).complete
    assert combine(given[:1] * 2, [1, 1]).complete
