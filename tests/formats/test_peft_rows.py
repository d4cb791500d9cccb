"""PEFT's trainable_token_indices, both ways: untied, tied, resized, in any order, and what is refused."""

from __future__ import annotations

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
from support.models.peers import SMALL, TENSORS, close, config_of, edit, redescribe, seeded
from support.models.token_rows import Net, assert_same_logits, fill_rows_
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = [17, 3, 63]  # as a user lists them, not ascending
KEY = "base_model.model.{}.token_adapter.trainable_tokens_delta"
OPTIONS: dict[str, dict[str, Any]] = {
    "list": {"trainable_token_indices": IDS},
    "both ends": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    "with the rest": {
        "trainable_token_indices": {"embed_tokens": IDS},
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
            transformers.Gemma3TextConfig(
                vocab_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                hidden_size=16,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        ["q_proj"],
        ["model.embed_tokens", "lm_head"],
    ),
}


@pytest.mark.transformers_5  # older ones have not these, or tie less of them
@pytest.mark.parametrize("family", FAMILIES)
def test_ties_of_other_families_follow_as_in_peft(tmp_path, family: str):
    build, targets, tables = FAMILIES[family]

    def output(net: Any) -> torch.Tensor:
        tokens = torch.tensor([[17, 3, 1, 63]])
        with torch.no_grad():
            result: torch.Tensor = net(tokens, **({"decoder_input_ids": tokens} if "t5" in family else {})).logits
        return result

    options = {"target_modules": targets, "trainable_token_indices": IDS}
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


def test_what_peft_ties_is_written_under_the_input_embeddings(tmp_path):
    ours = llama(True)
    ours._modules["model"] = ours._modules.pop("model")  # behind the head
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


def test_a_resized_table_goes_both_ways_with_its_rows(tmp_path, base: Path):
    model = theirs(resized(base, 1), tmp_path / "theirs", trainable_token_indices=[64, 69, 3])
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


# --- what cannot be the same in PEFT ---


def saved(net: nn.Module, folder: Path, **options: Any) -> None:
    inject(net, LoRAConfig(**{"target_modules": ["body"], **options}))
    fill_rows_(net)
    save_adapter(net, folder)


class Attachment(Net):
    """A table whose name ends in another's."""

    def __init__(self) -> None:
        super().__init__()
        self.position_emb = nn.Embedding(3, 4)


REFUSED = {
    "head with a bias": (lambda: Net(bias=True), {"head": [1]}, "'head' has trained rows and a bias; PEFT computes"),
    "tied head with a bias": (lambda: Net(tied=True, bias=True), {"emb": [1]}, "'head' has trained rows and a bias"),
    "a tie of the user's": (lambda: Net(tied=True), {"emb": [1]}, "'head' shares its weight with 'emb', and PEFT ties"),
    "an ending": (Attachment, {"emb": [1]}, "'emb' has trained rows, and PEFT would train those of 'position_emb' too"),
    "a tie inside of a network": (
        lambda: nn.ModuleDict({"llama": llama(True), "body": nn.Linear(2, 2)}),
        {"embed_tokens": [1]},
        r"'llama\.lm_head' shares its weight with 'llama\.model\.embed_tokens'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_would_compute_otherwise_is_not_written(tmp_path, case: str):
    build, indices, message = REFUSED[case]
    with pytest.raises(LoRAError, match=f"save_adapter: {message}"):
        saved(build(), tmp_path / "a", trainable_token_indices=indices)
    net = nn.ModuleDict({"net": Net(), "d": nn.Linear(3, 3)})  # PEFT's "d" takes head, too
    with pytest.raises(LoRAError, match=r"every module whose name ends in an entry, so that 'net\.head'"):
        saved(net, tmp_path / "a", modules_to_save=["d"], trainable_token_indices={"head": [1]})
    assert not (tmp_path / "a").exists()


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


def test_rows_of_one_end_of_a_tie_are_refused_where_peft_left_the_other_end_alone(tmp_path):
    """PEFT follows the tie from the input embeddings alone."""
    theirs(llama(True), tmp_path / "apart", trainable_token_indices={"embed_tokens": [1], "lm_head": [2]})
    with pytest.raises(LoRAError, match=r"gives 'model\.embed_tokens' the rows \[1\].*'lm_head', with which it shares"):
        load_adapter(llama(True), tmp_path / "apart")
    expected = logits(theirs(llama(True), tmp_path, trainable_token_indices={"lm_head": IDS}))
    model = llama(True)
    with pytest.raises(LoRAError, match=r"holds a value for one of them alone.*: model\.lm_head\.weight = nn\.Param"):
        load_adapter(model, tmp_path)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # what the message says
    load_adapter(model, tmp_path)
    assert_same_logits(logits(model), expected, IDS)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, "does not say which they are"),
        ([17, 3, "63"], "does not say which they are"),
        ([17, 3], r"names 2 rows of 'model\.embed_tokens', and the file has \(3, 32\)"),
        ([17, 3, 3], "twice, or by negative numbers"),
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


def test_rows_that_are_missing_or_no_matrix_or_do_not_say_which_they_are_are_refused(tmp_path):
    model = theirs(llama(False), tmp_path, **OPTIONS["list"])
    tensors = load_file(tmp_path / TENSORS)
    inject(ours := llama(False), LoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=IDS))
    for state in (model.state_dict(), tensors):
        with pytest.raises(LoRAError, match=r"trained rows of 'model\.embed_tokens', and not which rows these are"):
            load_adapter(ours, state)
    key = KEY.format("model.embed_tokens")
    message = r"missing|the file has \(32,\)|must have shape|holds NaN|must be a floating"
    for rows in (None, tensors[key][0], tensors[key][:, :3].contiguous(), tensors[key] * torch.nan, tensors[key].int()):
        changed = {name: value for name, value in tensors.items() if name != key}
        save_file(changed if rows is None else changed | {key: rows}, tmp_path / TENSORS)
        with pytest.raises(LoRAError, match=message):
            load_adapter(llama(False), tmp_path)


@pytest.mark.parametrize("damage", [{"emb": [2, 1]}, {"emb": "12"}, []])
def test_a_damaged_description_is_refused(tmp_path, damage: Any):
    saved(Net(), tmp_path, trainable_token_indices={"emb": [1, 2]})
    redescribe(tmp_path, tables=damage)
    with pytest.raises(LoRAError, match=r"description is damaged|it was cut"):
        load_adapter(Net(), tmp_path)
