"""PEFT's trainable_token_indices, both ways: untied, tied, resized, in any order, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged, save_adapter
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.formats.peft_rows import rows_from_peft
from support.notices import quiet_peers
from support.peers import SMALL, TENSORS, close, config_of, edit, seeded
from support.tables import Net, assert_same_logits, fill_rows_

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = [17, 3, 63]  # as a user lists them, not ascending
KEY = "base_model.model.{}.token_adapter.trainable_tokens_delta"
OPTIONS: dict[str, dict[str, Any]] = {
    "list": {"trainable_token_indices": IDS},
    "name": {"trainable_token_indices": {"embed_tokens": IDS}},
    "both ends": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    "with the rest": {
        "trainable_token_indices": IDS,
        "use_rslora": True,
        "bias": "all",
        "modules_to_save": ["input_layernorm"],
        "rank_pattern": {"q_proj": 2},
    },
}


def llama(tied: bool, **options: Any) -> Any:
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied, attention_bias=True, **options)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def logits(net: Any, rows: int = 64) -> torch.Tensor:
    tokens = torch.randint(rows, (2, 9), generator=torch.Generator().manual_seed(2))
    tokens[0, :4] = torch.tensor([*IDS, rows - 1])
    with torch.no_grad():
        result: torch.Tensor = net(tokens).logits
    return result


def spread_(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and "lora_" not in name.replace("lora_rows", ""):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def theirs(net: Any, folder: Path, **options: Any) -> Any:
    """What peft saves, with values in all that it trains but A and B: these are compared elsewhere, to a few digits."""
    model = peft.get_peft_model(net, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))
    spread_(model)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", OPTIONS)
def test_a_folder_of_peft_means_the_same_here_and_there_again(tmp_path, how: str, tied: bool):
    model = theirs(llama(tied), tmp_path / "theirs", **OPTIONS[how])
    expected = logits(model)
    ours = llama(tied)
    names = load_adapter(ours, tmp_path / "theirs")
    assert ("lm_head" in names) == (how == "both ends" and not tied)
    assert_same_logits(logits(ours), expected, IDS)
    assert not torch.allclose(expected, logits(llama(tied)), atol=1e-2)
    with merged(ours):
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=0)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    save_adapter(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    order = torch.tensor(IDS).argsort()
    for key, value in wanted.items():
        assert torch.equal(found[key], value[order] if "delta" in key else value), key
    back = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), expected, rtol=0, atol=0)
    load_adapter(again := llama(tied), tmp_path / "ours")
    assert_same_logits(logits(again), expected, IDS)


TINY: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
FAMILIES: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "t5, whose four tables are one": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, decoder_start_token_id=0)
        ),
        ["q"],
        ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    ),
    "gemma, which scales embeddings": (
        lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**TINY, hidden_size=16, num_key_value_heads=1, head_dim=8)
        ),
        ["q_proj"],
        ["model.embed_tokens", "lm_head"],
    ),
    "gpt2, whose embeddings have another name": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, attn_pdrop=0
            )
        ),
        ["c_attn"],
        ["transformer.wte", "lm_head"],
    ),
}


NEWER = ("t5", "gemma")  # which older transformers have not, or tie less of
OTHERS = [pytest.param(name, marks=[pytest.mark.transformers_5] * name.startswith(NEWER)) for name in FAMILIES]


@pytest.mark.parametrize("family", OTHERS)
def test_ties_of_other_families_follow_as_in_peft(tmp_path, family: str):
    build, targets, tables = FAMILIES[family]

    def output(net: Any) -> torch.Tensor:
        tokens = torch.tensor([[17, 3, 1, 63]])
        with torch.no_grad():
            result: torch.Tensor = net(tokens, **({"decoder_input_ids": tokens} if "t5" in family else {})).logits
        return result

    options = {"target_modules": targets, "trainable_token_indices": IDS, "fan_in_fan_out": "c_attn" in targets}
    model = theirs(seeded(build), tmp_path / "theirs", **options)
    expected = output(model)
    assert not torch.allclose(expected, output(seeded(build)), atol=1e-2)
    load_adapter(ours := seeded(build), tmp_path / "theirs")
    assert [name for name, module in ours.named_modules() if hasattr(module, "lora_rows")] == tables
    close(output(ours), expected)
    with merged(ours):
        close(output(ours), expected)
    save_adapter(ours, tmp_path / "ours")
    close(output(peft.PeftModel.from_pretrained(seeded(build), tmp_path / "ours").eval()), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_those_of_peft(tied: bool):
    indices = {"embed_tokens": IDS} if tied else {"embed_tokens": IDS, "lm_head": [5]}
    options: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    model = peft.get_peft_model(llama(tied), peft.LoraConfig(**options))
    inject(ours := llama(tied), LoRAConfig(**options))
    tokens = torch.tensor([[17, 1, 3, 3, 5, 9]])
    for net in (ours, model):
        net(tokens, labels=tokens).loss.backward()
    rows = [p.grad for name, p in model.named_parameters() if "tokens_delta" in name]
    found = [p.grad for name, p in ours.named_parameters() if "lora_rows" in name]
    assert len(found) == len(rows) == (1 if tied else 2)
    torch.testing.assert_close(found[0], rows[0][torch.tensor(IDS).argsort()], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[-1:], [rows[-1][: len(found[-1])]] if not tied else found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head_first", [False, True])
def test_what_peft_ties_is_written_under_the_input_embeddings(tmp_path, head_first: bool):
    ours = llama(True)
    if head_first:
        ours._modules["model"] = ours._modules.pop("model")
    inject(ours, LoRAConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": IDS}))
    fill_rows_(ours)
    save_adapter(ours, tmp_path)
    assert {key for key in load_file(tmp_path / TENSORS) if "lora_" not in key} == {KEY.format("model.embed_tokens")}
    assert config_of(tmp_path)["trainable_token_indices"] == {"model.embed_tokens": sorted(IDS)}
    back = peft.PeftModel.from_pretrained(llama(True), tmp_path).eval()
    assert_same_logits(logits(back), logits(ours), IDS)


# --- resized embeddings ---


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    llama(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base: Path, seed: int) -> Any:
    net = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.resize_token_embeddings(70, mean_resizing=False)
    return net.eval()


@pytest.mark.parametrize("indices", [[64, 69, 3], {"embed_tokens": [64, 69, 3]}], ids=["list", "name"])
def test_a_resized_table_goes_both_ways_with_its_rows(tmp_path, base: Path, indices: Any):
    model = theirs(resized(base, 1), tmp_path / "theirs", trainable_token_indices=indices)
    expected = logits(model, 70)
    load_adapter(ours := resized(base, 2), tmp_path / "theirs")
    assert_same_logits(logits(ours, 70), expected, [64, 69, 3])
    save_adapter(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / folder / TENSORS).keys() for folder in ("ours", "theirs"))
    assert wanted - found <= {KEY.format("lm_head")}  # of a tie, once is enough
    assert found <= wanted
    back = peft.PeftModel.from_pretrained(resized(base, 3), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back, 70), expected, rtol=0, atol=0)
    load_adapter(again := resized(base, 4), tmp_path / "ours")
    assert_same_logits(logits(again, 70), expected, [64, 69, 3])


@pytest.mark.slow
def test_a_table_that_was_resized_unseen_needs_no_rows_of_its_own(tmp_path, base: Path):
    """As where the checkpoint is not on this disk: PEFT stores the rows alone, and every new row is among them."""
    new = [64, 65, 66, 67, 68, 69]
    net = resized(base, 1)
    net.config.vocab_size = 64  # so that neither program sees it
    model = theirs(net, tmp_path / "theirs", trainable_token_indices=new)
    assert sum("embed" in key or "head" in key for key in load_file(tmp_path / "theirs" / TENSORS)) == 1
    ours = resized(base, 2)
    ours.config.vocab_size = 64
    load_adapter(ours, tmp_path / "theirs")
    tokens = torch.tensor([[1, *new, 2]])
    if ours.lm_head.weight is ours.model.embed_tokens.weight:
        assert_same_logits(ours(tokens).logits, model(tokens).logits, new)
    else:  # the head's new rows are drawn anew
        assert torch.equal(ours(tokens).logits[..., :64], model(tokens).logits[..., :64])
    save_adapter(ours, tmp_path / "ours")
    again = resized(base, 3)
    again.config.vocab_size = 64
    if ours.lm_head.weight is ours.model.embed_tokens.weight:
        load_adapter(again, tmp_path / "ours")
        assert_same_logits(again(tokens).logits, model(tokens).logits, new)


# --- what cannot be the same in PEFT ---


def saved(net: nn.Module, folder: Path, **options: Any) -> None:
    inject(net, LoRAConfig(**{"target_modules": ["body"], **options}))
    fill_rows_(net)
    save_adapter(net, folder)


class Beside(Net):
    """A table whose name ends in another's."""

    def __init__(self) -> None:
        super().__init__()
        self.position_emb = nn.Embedding(3, 4)


REFUSED = {
    "head with a bias": (lambda: Net(bias=True), {"head": [1]}, "'head' has trained rows and a bias; PEFT computes"),
    "tied head with a bias": (lambda: Net(tied=True, bias=True), {"emb": [1]}, "'head' has trained rows and a bias"),
    "a tie of the user's": (lambda: Net(tied=True), {"emb": [1]}, "'head' shares its weight with 'emb', and PEFT ties"),
    "an ending": (Beside, {"emb": [1]}, "'emb' has trained rows, and PEFT would train those of 'position_emb' too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_would_compute_otherwise_is_not_written(tmp_path, case: str):
    build, indices, message = REFUSED[case]
    with pytest.raises(LoRAError, match=f"save_adapter: {message}"):
        saved(build(), tmp_path / "a", trainable_token_indices=indices)
    assert not (tmp_path / "a").exists()


def test_a_tie_inside_of_a_network_that_peft_does_not_know_is_not_written(tmp_path):
    net = nn.ModuleDict({"llama": llama(True)})
    with pytest.raises(LoRAError, match=r"'llama\.lm_head' shares its weight with 'llama\.model\.embed_tokens'"):
        saved(net, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1]})


def test_modules_to_save_that_peft_takes_a_table_for_are_not_written(tmp_path):
    net = nn.ModuleDict({"net": Net(), "d": nn.Linear(3, 3)})  # PEFT's "d" takes head, too
    with pytest.raises(LoRAError, match=r"every module whose name ends in an entry, so that 'net\.head'"):
        saved(net, tmp_path / "a", modules_to_save=["d"], trainable_token_indices={"head": [1]})


def test_a_head_with_a_bias_that_peft_trained_is_refused(tmp_path):
    """PEFT left the bias out while it trained; here it takes part."""
    options: dict[str, Any] = {"target_modules": ["body"], "trainable_token_indices": {"head": [1, 2]}}
    model = peft.get_peft_model(seeded(lambda: Net(bias=True)), peft.LoraConfig(**options))
    tokens = torch.tensor([[1, 2]])
    plain = seeded(lambda: Net(bias=True))
    torch.testing.assert_close(model(tokens) + plain.head.bias, plain(tokens))  # the rows are untrained
    model.save_pretrained(str(tmp_path))
    before = [type(module) for module in plain.modules()]
    with pytest.raises(LoRAError, match="adapter: 'head' has trained rows and a bias; PEFT computes"):
        load_adapter(plain, tmp_path)
    assert [type(module) for module in plain.modules()] == before


def test_a_tie_that_peft_trained_apart_is_refused(tmp_path):
    theirs(llama(True), tmp_path, trainable_token_indices={"embed_tokens": [1], "lm_head": [2]})
    with pytest.raises(LoRAError, match=r"gives 'model\.embed_tokens' the rows \[1\].*'lm_head', with which it shares"):
        load_adapter(llama(True), tmp_path)


def test_rows_of_one_end_of_a_tie_are_refused_where_peft_left_the_other_end_alone(tmp_path):
    """PEFT follows the tie from the input embeddings alone."""
    expected = logits(theirs(llama(True), tmp_path, trainable_token_indices={"lm_head": IDS}))
    model = llama(True)
    with pytest.raises(LoRAError, match=r"holds a value for one of them alone.*: model\.lm_head\.weight = nn\.Param"):
        load_adapter(model, tmp_path)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # what the message says
    load_adapter(model, tmp_path)
    assert_same_logits(logits(model), expected, IDS)


@pytest.mark.transformers_5
def test_rows_of_an_end_that_is_no_input_embedding_are_refused_in_a_wrapped_model_too(tmp_path):
    build, targets, _ = FAMILIES["t5, whose four tables are one"]
    theirs(build(), tmp_path, target_modules=targets, trainable_token_indices={"decoder.embed_tokens": IDS})
    with pytest.raises(LoRAError, match=r"'0\.shared\.lora_rows' and '0\..* for one of them alone"):
        load_adapter(nn.Sequential(build()), tmp_path)


def test_rows_of_a_tie_that_peft_does_not_know_are_refused(tmp_path):
    theirs(Net(tied=True), tmp_path, target_modules=["body"], trainable_token_indices={"emb": [1]})
    with pytest.raises(LoRAError, match=r"'emb\.lora_rows' and 'head\.lora_rows' are one tensor .* one of them alone"):
        load_adapter(Net(tied=True), tmp_path)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, "does not say which they are"),
        ({"lm_head": IDS}, "does not say which they are"),
        ("17", "does not say which they are"),
        ([17, 3, "63"], "does not say which they are"),
        ([17, 3], r"names 2 rows of 'model\.embed_tokens', and the file has \(3, 32\)"),
        ([17, 3, 3], "twice, or by negative numbers"),
        ([17, 3, -1], "twice, or by negative numbers"),
        ({"embed_tokens": IDS, "lm_head": [1]}, "names 'lm_head', whose rows are missing"),
        ([17, 3, 10**30], r"'model\.embed_tokens': it has 64 rows and none of number 1000"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_the_rows_are_refused(tmp_path, indices: Any, message: str):
    theirs(llama(False), tmp_path, **OPTIONS["list"])
    edit(tmp_path, trainable_token_indices=indices)
    with pytest.raises(LoRAError, match=message):
        load_adapter(llama(False), tmp_path)


@pytest.mark.parametrize("names", [["embed", "decoder.embed"], ["decoder.embed", "embed"]], ids=str)
def test_the_longest_name_in_the_options_that_ends_a_tables_decides(names: list[str]):
    rows = {"embed": [1, 2], "decoder.embed": [3, 4]}
    tensors = {f"{part}.embed.lora_rows": torch.zeros(2, 5) for part in ("encoder", "decoder")}
    read = rows_from_peft(Adapter(tensors), {"trainable_token_indices": {name: rows[name] for name in names}}, "a file")
    assert read.tables == {"encoder.embed": (1, 2), "decoder.embed": (3, 4)}


def test_rows_that_are_missing_or_no_matrix_are_refused(tmp_path):
    theirs(llama(False), tmp_path, **OPTIONS["list"])
    tensors = load_file(tmp_path / TENSORS)
    key = KEY.format("model.embed_tokens")
    for rows in (None, tensors[key][0], tensors[key][:, :3].contiguous(), tensors[key] * torch.nan, tensors[key].int()):
        changed = {name: value for name, value in tensors.items() if name != key}
        save_file(changed if rows is None else changed | {key: rows}, tmp_path / TENSORS)
        with pytest.raises(
            LoRAError, match=r"missing|the file has \(32,\)|must have shape|holds NaN|must be a floating"
        ):
            load_adapter(llama(False), tmp_path)


def test_tensors_of_peft_that_do_not_say_which_rows_they_are_of_are_refused(tmp_path):
    model = theirs(llama(False), tmp_path, **OPTIONS["list"])
    inject(ours := llama(False), LoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=IDS))
    for state in (model.state_dict(), load_file(tmp_path / TENSORS)):
        with pytest.raises(LoRAError, match=r"trained rows of 'model\.embed_tokens', and not which rows these are"):
            load_adapter(ours, state)


@pytest.mark.parametrize("damage", [{"emb": [2, 1]}, {"emb": "12"}, {"other": [1, 2]}, [], {}])
def test_a_damaged_description_is_refused(tmp_path, damage: Any):
    from safetensors import safe_open

    saved(Net(), tmp_path, trainable_token_indices={"emb": [1, 2]})
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["lightning_lora"])
    description["tables"] = damage
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, metadata | {"lightning_lora": json.dumps(description)})
    with pytest.raises(LoRAError, match=r"description is damaged|it was cut"):
        load_adapter(Net(), tmp_path)
