"""What holds for each of PEFT's other methods: W' and every bit back, PEFT's folders both ways, refusals by name."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_lora.command.main import main
from support.files.expected_weights import check_merge_command
from support.models.methods import METHODS, SAME, TOKENS, base, moved, ours, theirs
from support.models.networks import bits, state_bits
from support.models.peers import config_of, edit
from support.runs.notices import quiet_peers

pytestmark = quiet_peers

EACH = [pytest.param(method, id=name) for name, method in METHODS.items()]
CASES = [
    pytest.param(method, case, id=f"{name}, {case}") for name, method in METHODS.items() for case in method.folders
]


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_rounds_once_and_restores_every_bit(method, dtype):
    model = moved(ours(method, base().to(dtype)))
    before, expected = state_bits(model), {name: method.reference(model, name) for name in method.layers}
    answer = model(TOKENS)
    merge(model)
    for name in method.layers:
        found, wanted = model.get_submodule(name).weight.detach(), expected[name].to(dtype)
        assert (found - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max(), name
    torch.testing.assert_close(model(TOKENS), answer, rtol=0, atol=40 * torch.finfo(dtype).eps)
    unmerge(model)
    assert state_bits(model) == before


@pytest.mark.parametrize(("method", "case"), CASES)
def test_pefts_folder_is_read_and_written_again(method, tmp_path, case):
    options, expected = method.folders[case]
    means = LoRAConfig.from_peft(method.config(**{**method.theirs, **options}))
    assert not means.differing(LoRAConfig(**{**method.ours, **expected}))
    other = moved(theirs(method, **options))
    other.save_pretrained(tmp_path / "theirs")
    model = base()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), other(TOKENS), **SAME)
    config = model.lora_injection.config
    assert config == LoRAConfig(**{**method.ours, **expected, "target_modules": config.target_modules})
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS), other(TOKENS), **SAME)
    written, before = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    by_layer = [name for name in method.written if name.endswith("_pattern")]
    same = [name for name in method.written if name not in by_layer]
    assert {name: written[name] for name in same} == {name: before[name] for name in same}
    for name in by_layer:  # written by layer
        assert sorted(written[name].values()) == sorted((before[name] or {}).values())


@pytest.mark.parametrize("case", ["plain", "patterns", "modules_to_save"])
@pytest.mark.parametrize("method", EACH)
def test_our_folder_is_read_by_peft_and_by_us(method, tmp_path, case):
    model = moved(ours(method, **method.folders[case][1]))
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(other(TOKENS), model(TOKENS), **SAME)
    again = base()
    load_adapter(again, tmp_path)
    assert again.lora_injection.config == model.lora_injection.config
    state = adapter_state_dict(model)
    assert adapter_state_dict(again).keys() == state.keys()
    assert all(torch.equal(adapter_state_dict(again)[name], value) for name, value in state.items())


@pytest.mark.parametrize("method", EACH)
def test_the_command_merges_pefts_folder_as_peft_does(method, tmp_path):
    other = moved(theirs(method))
    other.save_pretrained(tmp_path / "theirs")
    torch.save(base().state_dict(), tmp_path / "base.pt")
    files = {"base": "base.pt", "adapter": "theirs", "output": "o.pt"}
    paths = [f"--{name}={tmp_path / path}" for name, path in files.items()]
    assert main(["merge", *paths]) == 0
    check_merge_command(*paths)
    merged = torch.load(tmp_path / "o.pt", weights_only=True)
    for name, value in other.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    assert main(["info", str(tmp_path / "theirs")]) == 0


@pytest.mark.parametrize("method", EACH)
def test_an_option_that_cannot_be_applied_is_refused_by_name(method, tmp_path):
    moved(theirs(method)).save_pretrained(tmp_path)
    edit(tmp_path, something_new=3)
    with pytest.raises(LoRAError, match="something_new=3"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("method", EACH)
def test_a_tied_weight_is_never_changed(method):
    model = nn.Module()
    model.emb, model.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
    model.head.weight = model.emb.weight
    inject(model, LoRAConfig(variant=method.ours["variant"], r=2, target_modules=["head"]))
    moved(model)
    before, answer = bits(model.emb.weight), model.head(torch.ones(1, 6))
    merge(model)
    assert bits(model.emb.weight) == before
    assert torch.equal(model.head(torch.ones(1, 6)), answer)
