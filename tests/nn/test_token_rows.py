"""Rows of tables that are trained: against the definition in float64, merged and restored, tied, copied, refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_adapter,
    unload,
    unmerge,
)
from lightning_lora import take_adapter as adapter_of_model
from lightning_lora.exchange import apply
from lightning_lora.model import merging
from lightning_lora.model.adapted_model import open_model
from lightning_lora.nn.adapted_module import adapted_layers
from support.covering import covering
from support.files.expected_weights import merge_and_check
from support.models.layers import same_bits
from support.models.networks import checkpoint
from support.models.token_rows import (
    CASES,
    NUMBER,
    ROWS,
    WIDTH,
    Net,
    Subject,
    assert_same_logits,
    fill_rows_,
    make_subject,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
DTYPES = (*TOLERANCE, torch.float16)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}


def assert_same_weights(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(same_bits(model.get_parameter(name), value) for name, value in before.items())


def assert_near(found: torch.Tensor, subject: Subject, dtype: torch.dtype = torch.float32) -> None:
    reference = subject.reference()
    atol = TOLERANCE[dtype] * float(reference.abs().max())
    torch.testing.assert_close(found.double(), reference, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize(("name", "dtype"), covering([*CASES], [torch.float64, torch.float32, torch.bfloat16], meet=1))
def test_output_and_gradients_are_those_of_a_table_with_the_rows_in_place(name: str, dtype: torch.dtype):
    subject = make_subject(name, dtype)
    assert list(adapted_layers(subject.model)) == sorted(
        [*subject.case.tables, "body"], key=["emb", "body", "head"].index
    )
    assert not torch.allclose(subject.plain(subject.tokens).double(), subject.reference(), rtol=0.1)
    assert_near(subject.model(subject.tokens), subject, dtype)
    with merged(subject.model):
        assert_near(subject.model(subject.tokens), subject, dtype)
    if dtype == torch.bfloat16:
        return
    rows = {table: values.double().clone().requires_grad_() for table, values in subject.rows().items()}
    subject.reference(rows).square().sum().backward()
    subject.model(subject.tokens).square().sum().backward()
    for table, values in rows.items():
        found = subject.model.get_parameter(f"{table}.lora_rows").grad
        atol = TOLERANCE[dtype] * float(values.grad.abs().max())
        torch.testing.assert_close(found.double(), values.grad, rtol=TOLERANCE[dtype], atol=atol)
    base = [parameter for key, parameter in subject.model.named_parameters() if "lora" not in key]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base)


def test_rows_that_no_token_is_of_get_a_gradient_of_zeros():
    """DDP waits for a gradient of each parameter."""
    model = make_subject("embedding").model
    model(torch.tensor([[0, 1, 2, 8]])).sum().backward()
    assert not model.emb.lora_rows.grad.any()


def test_the_row_of_padding_gets_no_gradient_from_the_embedding():
    subject = make_subject("padding")
    subject.model.emb(subject.tokens).sum().backward()
    moved = subject.model.emb.lora_rows.grad.any(1)
    assert moved.tolist() == [row != 4 for row in ROWS]


def test_tokens_of_any_shape_and_kind_are_looked_up():
    subject = make_subject("embedding")
    for shape in ((), (0,), (3,), (2, 0, 3), (2, 3, 4)):
        for kind in (torch.int32, torch.int64):
            tokens = torch.randint(NUMBER, shape).to(kind)
            expected = nn.functional.embedding(tokens, subject.tables()["emb.weight"].float())
            assert torch.equal(subject.model.emb(tokens), expected)
            assert torch.equal(subject.model.emb(input=tokens), expected)
    strided = torch.randint(NUMBER, (4, 5)).T  # of which torch's search warns
    expected = nn.functional.embedding(strided, subject.tables()["emb.weight"].float())
    assert torch.equal(subject.model.emb(strided), expected)


@pytest.mark.parametrize(
    ("dtype", "name", "copies"), covering(DTYPES, ["both, untied", "tied", "scaled, tied"], [True, False], meet=1)
)
def test_merging_puts_the_rows_in_place_bit_for_bit_and_unmerging_takes_them_out(
    name: str, dtype: torch.dtype, copies: bool, monkeypatch
):
    if not copies:
        monkeypatch.setattr(merging, "COPY_BUDGET", 0)
    subject = make_subject(name, dtype)
    model, before = subject.model, weights(subject.model)
    places = {n: model.get_parameter(n).data_ptr() for n in before}
    for cycle in range(5):
        fill_rows_(model, 0.1 * (1 + cycle))
        found = merged_state_dict(model)
        merge(model)
        for table, rows in subject.rows().items():
            wanted = before[f"{table}.weight"].clone()
            wanted[subject.numbers(table)] = rows.to(dtype)
            assert same_bits(model.get_parameter(f"{table}.weight"), wanted)
            assert same_bits(found[f"{table}.weight"], wanted)
        unmerge(model)
        assert_same_weights(model, before)
    assert places == {n: model.get_parameter(n).data_ptr() for n in before}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-12), (torch.float64, 1.0)])
def test_many_rows_neighbours_and_strided_are_merged_bit_for_bit(dtype: torch.dtype, size: float):
    for rows in (range(100), range(0, 200, 2), [0, 1, 2, 50, 52, 53, 199]):
        model = nn.ModuleDict({"emb": nn.Embedding(200, 8), "body": nn.Linear(2, 2)}).to(dtype)
        inject(model, LoRAConfig(target_modules=["body"], trainable_token_indices={"emb": list(rows)}))
        with torch.no_grad():
            model["emb"].lora_rows.normal_().mul_(size)
        before = weights(model)
        with merged(model):
            assert same_bits(model["emb"].weight[list(rows)], model["emb"].lora_rows.detach())
        assert_same_weights(model, before)


@pytest.mark.parametrize("name", ["scaled, tied", "reader"])
def test_what_leaves_the_rows_out_is_the_plain_model(name: str):
    subject = make_subject(name)
    model, tokens, expected = subject.model, subject.tokens, subject.plain(subject.tokens)
    with disable_adapter(model):
        assert torch.equal(model(tokens), expected)
    twin = copy.deepcopy(model)
    output = merge_and_unload(twin)(tokens)
    assert_near(output, subject)
    unload(model)
    assert torch.equal(model(tokens), expected)
    for plain in (twin, model):
        assert [type(module) for module in plain.modules()] == [type(module) for module in subject.plain.modules()]
        assert list(plain.state_dict()) == list(subject.plain.state_dict())
        assert not any(key.startswith("lora") for module in plain.modules() for key in vars(module))
        assert (plain.head.weight is plain.emb.weight) == (subject.plain.head.weight is subject.plain.emb.weight)


def test_copies_and_pickles_are_adapted_and_tied_alike(monkeypatch):
    monkeypatch.setattr(merging, "COPY_BUDGET", 0)  # so that values are kept for restoring
    subject = make_subject("tied")
    model, before = subject.model, weights(subject.model)
    output = model(subject.tokens)
    merge(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        records = [record for layer in adapted_layers(twin).values() if (record := layer.lora.undo) is not None]
        assert len(records) == len(adapted_layers(model))
        unmerge(twin)
        assert_same_weights(twin, before)
        assert torch.equal(twin(subject.tokens), output)
        fill_rows_(twin, 3.0)
        for _ in range(2):
            merge(twin)
            unmerge(twin)
            assert_same_weights(twin, before)
        assert not torch.equal(twin(subject.tokens), output)
        assert len(list(twin.parameters())) == len(list(model.parameters()))
    unmerge(model)
    assert torch.equal(model(subject.tokens), output)


def test_rows_start_as_the_tables_own_and_the_rest_is_frozen():
    subject = make_subject("tied", fill=False)
    model = subject.model
    assert_same_logits(model(subject.tokens), subject.plain(subject.tokens), ROWS)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["emb.lora_rows", "body.lora_A", "body.lora_B"]
    assert model.head.lora_rows is model.emb.lora_rows
    assert list(adapter_state_dict(model)) == ["emb.lora_rows", "body.lora_A", "body.lora_B", "head.lora_rows"]
    assert list(model.state_dict()) == [
        *("emb.weight", "emb.lora_rows", "body.weight", "body.bias", "body.lora_A", "body.lora_B"),
        *("head.weight", "head.lora_rows"),
    ]


def test_rows_of_a_table_with_nan_are_its_own_as_long_as_nothing_changes_them():
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "body": nn.Linear(4, 4)})
    with torch.no_grad():
        model["emb"].weight[1, 2] = torch.nan  # as of a token that nothing was trained for
    inject(model, LoRAConfig(r=1, target_modules=["body"], trainable_token_indices={"emb": [1, 3]}))
    table = adapted_layers(model)["emb"]
    assert table.is_initial()
    with torch.no_grad():
        table.rows[1, 0] += 1
    assert not table.is_initial()


def test_a_module_of_another_kind_that_shares_the_weight_is_left_alone():
    model = Net()
    model.norms = nn.Module()
    model.norms.weight = model.emb.weight
    inject(model, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"emb": ROWS}))
    assert list(adapted_layers(model)) == ["emb", "body"]
    assert "norms.weight" in adapted_layers(model)["emb"].why_not_merge()


@pytest.mark.parametrize(("name", "is_merged"), [("embedding", False), ("tied", True)])
def test_rows_that_are_the_bases_follow_a_new_base_and_trained_ones_stay(name: str, is_merged: bool):
    for trained in (False, True):
        subject = make_subject(name, fill=trained)
        model, rows = subject.model, subject.rows()["emb"].clone()
        base = {key: value.clone() + 1 for key, value in subject.plain.state_dict().items()}
        if is_merged:
            merge(model)
        model.load_state_dict(base)
        unmerge(model)
        assert_same_weights(model, base)
        assert torch.equal(model.emb.lora_rows, rows if trained else base["emb.weight"][list(ROWS)])
        adapter = adapter_state_dict(make_subject(name).model)
        model.load_state_dict(adapter, strict=False)  # an adapter alone changes no base
        assert_same_weights(model, base)


def test_rows_of_a_model_on_the_meta_device_are_those_of_the_base_that_is_loaded():
    with torch.device("meta"):
        model = Net(tied=True)
    inject(model, LoRAConfig(target_modules=["body"], trainable_token_indices={"emb": ROWS}))
    model.to_empty(device="cpu")
    assert model.head.lora_rows is model.emb.lora_rows
    model.head.weight = model.emb.weight  # which torch unties, and transformers ties again
    base = Net(tied=True).state_dict()
    model.load_state_dict(base)
    assert torch.equal(model.emb.lora_rows, base["emb.weight"][list(ROWS)])
    plain = Net(tied=True)
    plain.load_state_dict(base)
    tokens = torch.arange(NUMBER)[None]
    torch.testing.assert_close(model(tokens), plain(tokens))


@pytest.mark.parametrize(
    ("name", "is_merged", "rows"), covering(["tied", "scaled, tied"], [False, True], ["loaded", "drawn"])
)
def test_tables_stay_tied_where_a_state_is_assigned(name: str, is_merged: bool, rows: str):
    subject = make_subject(name, fill=rows == "loaded")
    model: Any = subject.model
    source = copy.deepcopy(model)
    state = {key: value + 1 for key, value in source.state_dict().items() if rows == "loaded" or "lora" not in key}
    merge(model) if is_merged else None
    model.load_state_dict(state, assign=True)
    assert model.emb.weight is model.head.weight
    assert model.emb.lora_rows is model.head.lora_rows
    source.load_state_dict(state)
    merge(source) if is_merged else None
    assert torch.equal(model(subject.tokens), source(subject.tokens))
    unmerge(model)
    assert same_bits(model.head.weight, state["head.weight"])
    assert torch.equal(model.emb.lora_rows, source.emb.lora_rows)


@pytest.mark.parametrize("is_merged", [False, True])
def test_two_tables_in_a_state_that_is_assigned_are_two_and_right_also_while_merged(is_merged: bool):
    """As in torch, without adapters."""
    subject = make_subject("tied")
    model: Any = subject.model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["head.weight"] += 1
    merge(model) if is_merged else None
    model.load_state_dict(state, assign=True)
    tables = subject.tables()
    head = state["head.weight"].double()
    head[list(ROWS)] = tables["head.weight"][list(ROWS)]
    tables["head.weight"] = head
    wide = copy.deepcopy(subject.plain).double()
    wanted = functional_call(wide, tables, (subject.tokens,), tie_weights=False)
    torch.testing.assert_close(model(subject.tokens).double(), wanted, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(model.get_parameter(name), state[name]) for name in ("emb.weight", "head.weight"))


def test_tables_that_are_untied_after_injection_stay_factored():
    subject = make_subject("tied")
    model, before = subject.model, subject.model(subject.tokens)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
    plain = weights(model)
    with merged(model):
        assert_same_weights(model, plain)
        torch.testing.assert_close(model(subject.tokens), before)
    with pytest.raises(LoRAError, match="'emb': tables that were tied at injection are not any more"):
        merge_and_unload(model)


def test_rows_that_are_not_finite_are_refused_by_name_and_nothing_is_merged(tmp_path):
    subject = make_subject("tied")
    before = weights(subject.model)
    with torch.no_grad():
        subject.model.emb.lora_rows[2, 1] = torch.nan
    with pytest.raises(LoRAError, match="merge: layer 'emb'"):
        merge(subject.model)
    assert_same_weights(subject.model, before)
    assert subject.model(subject.tokens).isnan().any()
    with pytest.raises(LoRAError, match=r"save_adapter: 'emb\.lora_rows' holds NaN or Inf"):
        save_adapter(subject.model, tmp_path)


def test_other_rows_than_the_options_name_are_swapped_and_a_trainer_refuses_them():
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    inject(one, LoRAConfig(target_modules=["body"], trainable_token_indices={"emb": [1, 2]}))
    inject(other, LoRAConfig(target_modules=["body"], trainable_token_indices={"emb": [1, 3]}))
    with pytest.raises(LoRAError, match="of 'emb' the rows 1, 2 were trained, and here the options name 1, 3"):
        apply.apply_adapter(open_model(other, "test"), adapter_of_model(one))
    with pytest.raises(LoRAError, match=r"'emb\.lora_rows' must have shape \(2, 6\)"):
        load_adapter(other, {**adapter_state_dict(one), "emb.lora_rows": torch.zeros(3, WIDTH)})
    load_adapter(other, adapter_of_model(one))
    assert adapter_of_model(other).tables["emb"] == (1, 2)
    assert torch.equal(other.emb.lora_rows, one.emb.lora_rows)


class Sub(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.body = table, nn.Linear(3, 3)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "names nothing": (Net, {"trainable_token_indices": {"embb": [1]}}, "'embb' names no table; did you mean 'emb'"),
    "no table": (lambda: Sub(nn.LayerNorm(3)), {"trainable_token_indices": {"table": [1]}}, "a LayerNorm is no table"),
    "beyond the table": (
        Net,
        {"trainable_token_indices": {"emb": [1, NUMBER]}},
        "it has 40 rows and none of number 40",
    ),
    "in target_modules too": (
        Net,
        {"target_modules": ["body", "emb"], "trainable_token_indices": {"emb": [1]}},
        "'emb': it is in target_modules too",
    ),
    "the other end in target_modules": (
        lambda: Net(tied=True),
        {"target_modules": ["body", "head"], "trainable_token_indices": {"emb": [1]}},
        "'head': it is in target_modules too",
    ),
    "in modules_to_save too": (
        Net,
        {"modules_to_save": ["emb"], "trainable_token_indices": {"emb": [1]}},
        "'emb': it is in modules_to_save too",
    ),
    "max_norm": (lambda: Net(max_norm=1.0), {"trainable_token_indices": {"emb": [1]}}, "max_norm renormalises"),
    "by frequency": (
        lambda: Net(scale_grad_by_freq=True),
        {"trainable_token_indices": {"emb": [1]}},
        "scale_grad_by_freq counts",
    ),
    "other rows for the ends of a tie": (
        lambda: Net(tied=True),
        {"trainable_token_indices": {"emb": [1], "head": [1, 2]}},
        r"gives 'head' the rows \[1, 2\], and \[1\] by 'emb', with which it shares its weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_by_rows_is_refused_and_nothing_is_changed(case: str):
    build, options, message = REFUSED[case]
    model = build()
    before = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(LoRAError, match=message):
        inject(model, LoRAConfig(**{"target_modules": ["body"]} | options))
    assert ([type(module) for module in model.modules()], list(model.state_dict())) == before


def test_all_linear_leaves_a_head_with_trained_rows_alone():
    model = Net()
    assert inject(model, LoRAConfig(trainable_token_indices={"head": [1]})) == ["body", "head"]
    assert not hasattr(model.head, "lora_A")


def test_a_list_means_the_input_embeddings_of_the_one_transformers_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0))

    options = LoRAConfig(target_modules=["c_attn"], trainable_token_indices=[1])
    model = nn.ModuleDict({"lm": gpt2()})
    assert inject(model, options) == ["lm.transformer.wte", "lm.transformer.h.0.attn.c_attn"]
    assert model["lm"].lm_head.lora_rows is model["lm"].transformer.wte.lora_rows
    with pytest.raises(LoRAError, match=r"holds 2 transformers models; name the table.*'one\.transformer\.wte': \[1\]"):
        inject(nn.ModuleDict({"one": gpt2(), "two": gpt2()}), options)
    plain = nn.ModuleDict({"embed_tokens": nn.Embedding(3, 3), "c_attn": nn.Linear(3, 3)})
    assert inject(plain, options) == ["embed_tokens", "c_attn"]


@pytest.mark.parametrize(
    ("dtype", "value", "tied"), covering(DTYPES, [torch.nan, torch.inf, -torch.inf], [True, False], meet=1)
)
def test_rows_take_the_place_of_rows_that_are_not_finite(tmp_path, dtype: torch.dtype, value: float, tied: bool):
    """As those of new tokens in memory that nothing has written to."""
    net = Net(tied=tied).to(dtype)
    with torch.no_grad():
        net.emb.weight[[3, 4, 17]] = value
        net.emb.weight[39, 2] = value
    torch.save(net.state_dict(), tmp_path / "base.pt")
    before = net.emb.weight.detach().clone()
    inject(net, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"emb": list(ROWS)}))
    rows = net.get_parameter("emb.lora_rows")
    with torch.no_grad():
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    expected = net.emb.weight.detach().index_copy(0, torch.tensor(ROWS), rows.detach().to(dtype))
    for _ in range(2):
        with merged(net):
            assert torch.equal(net.emb.weight, expected)
        assert same_bits(net.emb.weight, before)
    assert torch.equal(merged_state_dict(net)["emb.weight"], expected)
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    merge_and_check(tmp_path / "base.pt", tmp_path / "a.ckpt", tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt")["emb.weight"], expected)
    merge_and_unload(net)
    assert torch.equal(net.emb.weight, expected)


def test_a_base_that_is_not_finite_beside_the_rows_is_still_refused():
    net = Net()
    inject(net, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"emb": list(ROWS)}))
    with torch.no_grad():
        net.body.weight[0, 0] = torch.nan
    with pytest.raises(LoRAError, match="'body'"), merged(net):
        pass
    assert not is_merged(net)


def test_an_adapter_of_a_module_around_it_fits_the_network_inside():
    outer = nn.ModuleDict({"net": Net()})
    inject(outer, LoRAConfig(target_modules=["body"], trainable_token_indices={"net.emb": ROWS}))
    fill_rows_(outer)
    inner = Net()
    inner.load_state_dict(
        {name.removeprefix("net."): value for name, value in outer.state_dict().items() if "lora" not in name}
    )
    load_adapter(inner, adapter_of_model(outer))
    assert torch.equal(inner.emb.lora_rows, outer["net"].emb.lora_rows)
