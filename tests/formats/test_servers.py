"""What servers make of PEFT's folders: every rule of servers.json by itself, and the plain form under all of them."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, export_adapter, inject, save_adapter, take_adapter
from lightning_lora.command.main import main
from lightning_lora.formats.servers import CONDITIONS, FolderView, Server, findings, servers, view_of_folder
from support.models import checkpoint
from support.notices import quiet_peers
from support.peers import TENSORS, call, config_of, edit, fill_, ours, refused, seeded, theirs

pytestmark = quiet_peers
ATTENTION = "base_model.model.model.layers.0.self_attn."
FACTORS = {
    f"{ATTENTION}{layer}.lora_{leaf}.weight": shape
    for layer in ("q_proj", "v_proj")
    for leaf, shape in (("A", (4, 16)), ("B", (16, 4)))
}
GOOD = FolderView(
    {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "base_model_name_or_path": "base",
        "init_lora_weights": True,
    },
    FACTORS,
)


def with_options(**options: Any) -> FolderView:
    return replace(GOOD, options={**GOOD.options, **options})


def with_tensors(*names: str, shape: tuple[int, ...] = (16, 16)) -> FolderView:
    return replace(GOOD, shapes={**FACTORS, **{f"base_model.model.{name}": shape for name in names}})


def without(layer: str) -> FolderView:
    kept = {name: shape for name, shape in FACTORS.items() if layer not in name}
    return replace(GOOD, shapes=kept)


MAGNITUDE, NORM = "model.layers.0.self_attn.q_proj.lora_magnitude_vector", "model.layers.0.input_layernorm.weight"
CONVOLUTION = replace(GOOD, shapes={**FACTORS, f"{ATTENTION}conv.lora_A.weight": (4, 3, 3, 3)})
OTHER_RANK = replace(GOOD, shapes={**FACTORS, f"{ATTENTION}q_proj.lora_A.weight": (8, 16)})
HEAD = with_tensors("lm_head.lora_A.weight", "lm_head.lora_B.weight", shape=(4, 4))
ROWS = with_tensors("model.embed_tokens.token_adapter.trainable_tokens_delta")
PARAMETER = with_options(target_parameters=["mixer.weight"])
# By server and rule: a folder of which the rule holds, and what is named.
CASES: dict[tuple[str, str], tuple[FolderView, str]] = {
    ("vllm", "type"): (with_options(lora_alpha=None), "lora_alpha"),
    ("vllm", "dora"): (with_options(use_dora=True), "use_dora=True"),
    ("vllm", "saved modules"): (with_options(modules_to_save=["score", "lm_head"]), "lm_head"),
    ("vllm", "bias"): (with_options(bias="lora_only"), "bias='lora_only'"),
    ("vllm", "start"): (with_options(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    ("vllm", "lora_bias"): (with_options(lora_bias=True), "lora_bias=True"),
    ("vllm", "alora"): (with_options(alora_invocation_tokens=[1]), "alora_invocation_tokens=[1]"),
    ("vllm", "replication"): (with_options(layer_replication=[[0, 1]]), "layer_replication=[[0, 1]]"),
    ("vllm", "block diagonal"): (with_options(use_bdlora={"a": 1}), "use_bdlora={'a': 1}"),
    ("vllm", "qalora"): (with_options(use_qalora=True), "use_qalora=True"),
    ("vllm", "rank"): (replace(GOOD, shapes={f"{ATTENTION}q_proj.lora_A.weight": (17, 16)}), "rank 17"),
    ("vllm", "tensors"): (with_tensors(MAGNITUDE), f"base_model.model.{MAGNITUDE}"),
    ("vllm", "base tables"): (
        with_tensors("model.embed_tokens.base_layer.weight"),
        "base_model.model.model.embed_tokens.base_layer.weight",
    ),
    ("vllm", "convolutions"): (CONVOLUTION, f"{ATTENTION}conv.lora_A.weight"),
    ("vllm", "parameters"): (
        with_options(target_parameters=["mlp.experts.gate_up_proj", "mixer.weight"]),
        "mixer.weight",
    ),
    ("vllm", "ranks"): (with_options(rank_pattern={"q_proj": 8}), "rank_pattern={'q_proj': 8}"),
    ("vllm", "alphas"): (with_options(alpha_pattern={"q_proj": 8}), "alpha_pattern={'q_proj': 8}"),
    ("sglang", "fields"): (with_options(target_modules=None), "target_modules"),
    ("sglang", "type"): (with_options(peft_type="VERA"), "peft_type='VERA'"),
    ("sglang", "dora"): (with_options(use_dora=True), "use_dora=True"),
    ("sglang", "expression"): (with_options(target_modules=".*_proj"), "target_modules='.*_proj'"),
    ("sglang", "rslora"): (with_options(use_rslora=True), "use_rslora=True"),
    ("sglang", "alphas"): (with_options(alpha_pattern={"q_proj": 8}), "alpha_pattern={'q_proj': 8}"),
    ("sglang", "ranks"): (OTHER_RANK, "model.layers.0.self_attn.q_proj"),
    ("sglang", "query without value"): (without("v_proj"), "model.layers.0.self_attn.q_proj"),
    ("sglang", "value without query"): (without("q_proj"), "model.layers.0.self_attn.v_proj"),
    ("sglang", "key without query"): (
        replace(GOOD, shapes={f"{ATTENTION}k_proj.lora_A.weight": (4, 16)}),
        "model.layers.0.self_attn.k_proj",
    ),
    ("sglang", "outside blocks"): (with_tensors("score.lora_A.weight"), "base_model.model.score.lora_A.weight"),
    ("sglang", "whole tensors"): (with_tensors(NORM), f"base_model.model.{NORM}"),
    ("sglang", "rows and tables"): (ROWS, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ("llama.cpp", "fields"): (with_options(lora_alpha=None), "lora_alpha"),
    ("llama.cpp", "rslora"): (with_options(use_rslora=True), "use_rslora=True"),
    ("llama.cpp", "alphas"): (with_options(alpha_pattern={"q_proj": 8}), "alpha_pattern={'q_proj': 8}"),
    ("llama.cpp", "transposed"): (with_options(fan_in_fan_out=True), "fan_in_fan_out=True"),
    ("llama.cpp", "norms"): (with_tensors(NORM), f"base_model.model.{NORM}"),
    ("llama.cpp", "biases of norms"): (
        with_tensors("model.layers.0.input_layernorm.bias"),
        "base_model.model.model.layers.0.input_layernorm.bias",
    ),
    ("llama.cpp", "base tables"): (
        with_tensors("model.embed_tokens.base_layer.weight"),
        "base_model.model.model.embed_tokens.base_layer.weight",
    ),
    ("llama.cpp", "tensors"): (with_tensors(MAGNITUDE), f"base_model.model.{MAGNITUDE}"),
    ("llama.cpp", "convolutions"): (CONVOLUTION, f"{ATTENTION}conv.lora_A.weight"),
    ("llama.cpp", "towers"): (
        with_tensors("vision_tower.layers.0.q_proj.lora_A.weight"),
        "base_model.model.vision_tower.layers.0.q_proj.lora_A.weight",
    ),
    ("llama.cpp", "names"): (with_tensors("score.lora_A.weight"), "base_model.model.score.lora_A.weight"),
    ("llama.cpp", "parameters"): (
        with_options(target_parameters=["mlp.experts.gate_up_proj", "mlp.gate.weight"]),
        "mlp.experts.gate_up_proj",
    ),
    ("llama.cpp", "head"): (HEAD, "base_model.model.lm_head.lora_A.weight"),
    ("llama.cpp", "embedding"): (
        with_tensors("model.embed_tokens.lora_embedding_A"),
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ),
    ("llama.cpp", "base"): (with_options(base_model_name_or_path=None), "base_model_name_or_path"),
    ("peft", "outside"): (replace(GOOD, outside=["criterion.weight"]), "criterion.weight"),
    ("peft", "whole module"): (replace(GOOD, pretrained="encoder"), "not encoder alone"),
    ("peft", "convolutions"): (CONVOLUTION, f"{ATTENTION}conv.lora_A.weight"),
    ("peft", "encoder layers"): (
        with_tensors("encoder.layers.0.linear1.lora_A.weight"),
        "base_model.model.encoder.layers.0.linear1.lora_A.weight",
    ),
    ("diffusers", "type"): (with_options(peft_type="LOHA"), "peft_type='LOHA'"),
    ("diffusers", "scale"): (with_options(alpha_pattern={"q_proj": 8}), "model.layers.0.self_attn.q_proj"),
    ("diffusers", "parameters"): (PARAMETER, "target_parameters=['mixer.weight']"),
    ("diffusers", "embeddings alone"): (
        replace(GOOD, shapes={"base_model.model.emb.lora_embedding_A": (4, 9)}),
        "base_model.model.emb.lora_embedding_A",
    ),
    ("diffusers", "rows"): (ROWS, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_rule_of_a_server_holds_for_its_folder_and_not_for_a_good_one(case: tuple[Server, str]):
    server, rule = case
    view, named = CASES[case]
    assert findings(GOOD, server) == []
    (found,) = [each for each in findings(view, server) if each["id"] == rule]
    assert named in found["names"]


@pytest.mark.parametrize("server", get_args(Server))
@pytest.mark.parametrize("shape", [(), (0, 16)], ids=str)
def test_factor_without_a_rank_is_looked_at_all_the_same(server: Server, shape: tuple[int, ...]):
    view = replace(GOOD, shapes={**FACTORS, f"{ATTENTION}q_proj.lora_A.weight": shape})
    assert all(each["names"] for each in findings(view, server))


@pytest.mark.parametrize(
    ("patterns", "scale"),
    [({"q_proj": 8, ".*_proj": 2}, 2), ({".*_proj": 2, "q_proj": 8}, 0.5), ({"v_proj": 8}, 1), ({"q_proj": "8"}, 1)],
)
def test_first_pattern_with_a_number_gives_a_module_its_alpha_as_in_peft(patterns: dict[str, Any], scale: float):
    assert with_options(alpha_pattern=patterns).scale("model.layers.0.self_attn.q_proj") == scale


def test_every_rule_is_tried_and_has_an_effect_and_a_source():
    assert set(get_args(Server)) == servers().keys()
    rules = {(server, rule["id"]): rule for server, about in servers().items() for rule in about["rules"]}
    assert rules.keys() == CASES.keys()
    assert all(rule["effect"] in ("refuses", "drops", "runs wrongly", "needs") for rule in rules.values())
    assert all(rule["says"] and ", " in rule["source"] for rule in rules.values())
    assert {next(iter(rule["when"])) for rule in rules.values()} == CONDITIONS.keys()
    assert all(about[key] for about in servers().values() for key in ("name", "version", "read", "load"))


PAGE = Path(__file__).parents[2] / "lightning_lora" / "formats" / "serving.md"
BEGIN, END = "<!-- rules of servers: written by tests/formats/test_servers.py -->", "<!-- end of the rules -->"


def table() -> str:
    lines = []
    for about in servers().values():
        lines += [f"**{about['name']}**, {about['version']}. Read: {about['read']}.", ""]
        lines += ["| it | what | where it stands |", "|---|---|---|"]
        for rule in about["rules"]:
            condition = ", ".join(f"`{key}`: `{json.dumps(value)}`" for key, value in rule["when"].items())
            before = f" before {rule['before']}" if "before" in rule else ""
            told = f"{rule['says']}. {condition}".replace("|", "\\|")
            lines.append(f"| {rule['effect']}{before} | {told} | {rule['source']} |")
        lines.append("")
    return "\n".join(lines)


def test_page_has_the_table_of_rules():
    """WRITE_TABLE=1 in the environment writes it."""
    before, rest = PAGE.read_text().split(BEGIN)
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}")
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0].strip() == table().strip()


BY_MERGING: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "dilation": (lambda: nn.Conv1d(3, 3, 3, padding="same", dilation=2), "all-layers", (2, 3, 9)),
    "padding_mode": (lambda: nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"), "all-layers", (2, 3, 9)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 8, 0, batch_first=True), ["linear1", "linear2"], (2, 3, 8)),
}


@pytest.mark.parametrize("case", BY_MERGING)
def test_layer_that_peft_runs_rightly_only_when_merged_is_told(tmp_path, case: str):
    build, targets, shape = BY_MERGING[case]
    net, x = seeded(lambda: nn.Sequential(build()).eval()), torch.randn(shape)
    inject(net, LoRAConfig(r=2, target_modules=targets))
    save_adapter(fill_(net), tmp_path)
    told = [each["says"] for each in findings(view_of_folder(tmp_path), "peft")]
    assert told
    assert all(says.startswith("merge_and_unload() ") for says in told)
    other = peft.PeftModel.from_pretrained(seeded(lambda: nn.Sequential(build()).eval()), tmp_path).eval()
    assert (other(x) - net(x)).abs().max() > 0.01
    torch.testing.assert_close(other.merge_and_unload()(x), net(x), rtol=0, atol=1e-5)


def scales(path: Path) -> dict[str, dict[str, float]]:
    """The scale that the source of each server gives each module; PEFT's is what it should be."""
    view = view_of_folder(path)
    alpha, rank = view.options["lora_alpha"], view.options["r"]
    root = math.sqrt(rank) if view.options.get("use_rslora") else rank
    return {
        "peft": {name: view.scale(name) for name in view.ranks},
        "vllm before 0.32": dict.fromkeys(view.ranks, alpha / root),
        "sglang": dict.fromkeys(view.ranks, alpha / rank),
        "llama.cpp": {name: alpha / r for name, r in view.ranks.items()},
        "diffusers": dict.fromkeys(view.ranks, 1.0),
    }


SCALED: list[dict[str, Any]] = [
    {"rank_pattern": None, "alpha_pattern": None},
    {"rank_pattern": None, "alpha_pattern": None, "lora_alpha": 4},
    {"rank_pattern": None, "alpha_pattern": None, "use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": None},
    {"rank_pattern": None, "alpha_pattern": {"q_proj": 3}},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
]


@pytest.mark.parametrize("options", SCALED)
def test_wrong_scale_is_found_where_a_servers_own_formula_gives_another_one(tmp_path, options: dict[str, Any]):
    """The formulas are written here again, from the sources that servers.json names."""
    ours("llama", tmp_path, **options)
    found = scales(tmp_path)
    for name, scale in found.items():
        server: Any = name.partition(" ")[0]
        before = {"before"} if " " in name else set()
        told = [f for f in findings(view_of_folder(tmp_path), server) if before == {"before"} & f.keys()]
        wrong = [f for f in told if f["effect"] == "runs wrongly" or f["id"] == "ranks"]
        differs = any(not math.isclose(scale[each], found["peft"][each]) for each in scale)
        assert bool(wrong) >= differs, name
        assert differs or all(f["id"] in ("ranks", "alphas") for f in wrong), name


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"variant": "loha"}])
@pytest.mark.parametrize("server", get_args(Server))
def test_plain_form_is_taken_by_every_server(tmp_path, server: Server, options: dict[str, Any]):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    net = ours("llama", **{"target_modules": ["q_proj", "v_proj"], **patterns, **options})
    export_adapter(take_adapter(net), tmp_path, plain=True)
    edit(tmp_path, base_model_name_or_path="base")
    assert findings(view_of_folder(tmp_path), server) == []
    assert {scale for by_module in scales(tmp_path).values() for scale in by_module.values()} == {1.0}


def test_folder_that_cannot_be_read_here_is_looked_at_all_the_same(tmp_path, capsys: pytest.CaptureFixture[str]):
    theirs("llama", tmp_path)
    edit(tmp_path, init_lora_weights="pissa", lora_bias=True)
    printed = call(capsys, "info", tmp_path, "--for", "vllm")
    assert "refuses: such a start changed the base's weights: init_lora_weights='pissa'" in printed
    assert "refuses: it takes no bias of B: lora_bias=True" in printed
    assert "no plain form: " in printed
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    assert call(capsys, "info", tmp_path, "--for", "vllm") == printed


def test_command_tells_what_a_server_makes_of_an_adapter_and_of_its_plain_form(tmp_path, capsys: Any):
    ours("llama", tmp_path / "own", use_rslora=True)
    text = call(capsys, "info", tmp_path / "own", "--for", "llama.cpp")
    assert text.startswith(f"{tmp_path}/own: PEFT folder\nby the source of llama.cpp commit ")
    assert "  runs wrongly: it scales by lora_alpha / r, which is too weak by the root of r: use_rslora=True (" in text
    assert f"what all servers take: lightning-lora export {tmp_path}/own OUTPUT --plain\n  still needs: " in text
    found = json.loads(call(capsys, "info", tmp_path / "own", "--for", "llama.cpp", "--json"))
    assert found.keys() == {"path", "kind", "server", "findings", "plain"}
    assert [each["id"] for each in found["findings"]] == ["rslora", "alphas", "base"]
    assert [each["id"] for each in found["plain"]] == ["base"]
    assert found["server"] == {k: v for k, v in servers()["llama.cpp"].items() if k != "rules"}
    export_adapter(tmp_path / "own", tmp_path / "plain", plain=True)
    text = call(capsys, "info", tmp_path / "plain", "--for", "sglang")
    assert "takes all of it: python -m sglang.launch_server" in text
    assert text.endswith("\n  not checked: whether SGLang has LoRA for this architecture\n")
    assert "export" not in text


@pytest.mark.parametrize(
    ("server", "options", "argument"),
    [("vllm", {"r": 17}, "vllm serve --max-lora-rank"), ("llama.cpp", {}, "convert_lora_to_gguf.py --base BASE")],
)
def test_argument_that_a_server_needs_is_no_refusal_and_asks_for_no_plain_form(
    tmp_path, capsys: Any, server: Server, options: dict[str, Any], argument: str
):
    ours("llama", tmp_path / "own", **{"rank_pattern": None, "alpha_pattern": None, **options})
    needs, taken, unchecked = call(capsys, "info", tmp_path / "own", "--for", server).splitlines()[2:]
    assert unchecked == f"  not checked: whether {servers()[server]['name']} has LoRA for this architecture"
    assert needs.startswith(f"  needs: {argument}")
    assert taken == f"  takes all of it: {servers()[server]['load']}"
    assert "plain" not in json.loads(call(capsys, "info", tmp_path / "own", "--for", server, "--json"))


def test_source_that_is_no_folder_is_exported_first_by_the_command_that_is_told(
    tmp_path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ours("llama", "own", rank_pattern=None, alpha_pattern=None)
    call(capsys, "import", "own", "the best.ckpt")
    told = call(capsys, "info", "the best.ckpt", "--for", "vllm").splitlines()
    first = json.loads(call(capsys, "info", "the best.ckpt", "--for", "vllm", "--json"))["first"]
    assert told[1] == f"servers read folders; write one first: {first}, or export_adapter in Python"
    call(capsys, *shlex.split(first)[1:])
    of_folder = call(capsys, "info", "FOLDER", "--for", "vllm").splitlines()
    unchecked = "  not checked: whether vLLM has LoRA for this architecture"
    assert told[2:] == of_folder[1:] == [told[2], f"  takes all of it: {servers()['vllm']['load']}", unchecked]
    mended = call(capsys, "info", "the best.ckpt", "--for", "diffusers")
    assert mended.count("export") == 1
    assert "lightning-lora export 'the best.ckpt' OUTPUT --plain" in mended


@pytest.mark.parametrize("server", ["peft", "diffusers"])
def test_reader_that_takes_any_network_has_nothing_unchecked(tmp_path, capsys: Any, server: Server):
    ours("llama", tmp_path)
    assert "not checked" not in call(capsys, "info", tmp_path, "--for", server)


@pytest.mark.parametrize("server", get_args(Server))
def test_way_to_load_is_told_whatever_the_server_makes_of_the_adapter(tmp_path, capsys: Any, server: Server):
    ours("llama", tmp_path, use_rslora=True, use_dora=True)
    assert f": {servers()[server]['load']}\n" in call(capsys, "info", tmp_path, "--for", server)


def blocks(layer: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(layer(), nn.BatchNorm2d(3)) for _ in range(8)))


OTHER_NETWORKS = [
    *((server, lambda: nn.Conv2d(3, 3, 3), {}) for server in ("vllm", "sglang", "llama.cpp")),
    *((server, lambda: nn.Conv2d(3, 3, 3), {"variant": "loha"}) for server in ("sglang", "llama.cpp")),
    *((server, lambda: nn.Linear(3, 3), {"use_rslora": True}) for server in ("sglang", "llama.cpp")),
]


@pytest.mark.parametrize(("server", "layer", "options"), OTHER_NETWORKS)
def test_network_that_the_server_cannot_know_is_told_first_and_in_short_that_no_merging_helps(
    tmp_path, capsys: Any, server: Server, layer: Callable[[], nn.Module], options: dict[str, Any]
):
    net = seeded(lambda: blocks(layer))
    inject(net, LoRAConfig(r=2, target_modules=[f"{at}.0" for at in range(8)], **options))
    save_adapter(fill_(net), tmp_path / "own")
    call(capsys, "import", tmp_path / "own", tmp_path / "a.ckpt")
    for source in ("own", "a.ckpt"):
        _, by, first, *rest = call(capsys, "info", tmp_path / source, "--for", server).splitlines()
        assert by.startswith(f"by the source of {servers()[server]['name']} ")
        assert first == f"  merged or not, it serves only {servers()[server]['serves']}"
        assert all(line.startswith(("  refuses: ", "  drops: ", "  runs wrongly: ", "  needs: ")) for line in rest)
        assert "base_model.model.1.0." not in "".join(rest)  # the names are shortened
        found = json.loads(call(capsys, "info", tmp_path / source, "--for", server, "--json"))
        assert found["other_architecture"] is True


@pytest.mark.parametrize("server", get_args(Server))
def test_network_of_a_language_model_is_not_taken_for_another_one(tmp_path, capsys: Any, server: Server):
    ours("llama", tmp_path, use_dora=True, modules_to_save=["lm_head"])
    printed = call(capsys, "info", tmp_path, "--for", server).splitlines()
    assert "merged or not" not in printed[2]
    assert "other_architecture" not in json.loads(call(capsys, "info", tmp_path, "--for", server, "--json"))


@pytest.mark.parametrize(
    ("name", "hint"), [("llamacpp", "; did you mean 'llama.cpp'?"), ("vLLM", "; did you mean 'vllm'?"), ("", ".")]
)
def test_server_that_is_not_known_is_answered_with_the_nearest_in_one_line(tmp_path, capsys: Any, name: str, hint: str):
    told = refused(capsys, "info", tmp_path, f"--for={name}")
    known = "There are vllm, sglang, llama.cpp, peft, diffusers."
    assert told.endswith(f"info: --for: {name!r} is no server that is known{hint} {known}\n")


def test_command_looks_at_what_export_would_write_of_another_source(tmp_path, capsys: pytest.CaptureFixture[str]):
    ours("llama", tmp_path / "own", use_rslora=True)
    call(capsys, "import", tmp_path / "own", tmp_path / "a.ckpt")
    folder, checkpoint = (
        json.loads(call(capsys, "info", tmp_path / name, "--for", "sglang", "--json")) for name in ("own", "a.ckpt")
    )
    assert folder["findings"] == checkpoint["findings"] != []
    net = seeded(lambda: nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)))
    inject(net, LoRAConfig(r=1, target_modules=["0"]))
    torch.save(dict(fill_(net).state_dict()), tmp_path / "bare.pt")
    assert "pass --lora-alpha" in refused(capsys, "info", tmp_path / "bare.pt", "--for", "peft")


def test_command_tells_of_weights_that_they_are_no_adapter(tmp_path, capsys: pytest.CaptureFixture[str]):
    save_file({"one.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    assert "holds no adapter, and --for tells what vllm makes" in refused(
        capsys, "info", tmp_path / "w.safetensors", "--for", "vllm"
    )


def test_rounding_of_a_plain_form_that_is_looked_at_alone_is_not_warned_of(tmp_path, capsys: Any, recwarn: Any):
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 8)))
    inject(net, LoRAConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["0"], autocast_adapter_dtype=False))
    save_adapter(fill_(net).bfloat16(), tmp_path)
    recwarn.clear()
    assert "plain" in json.loads(call(capsys, "info", tmp_path, "--for", "sglang", "--json"))
    assert not recwarn.list


def test_adapter_that_peft_cannot_express_is_refused_by_all(tmp_path, capsys: pytest.CaptureFixture[str]):
    net = seeded(lambda: nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=3)))
    inject(net, LoRAConfig(r=1, target_modules=["0"]))
    torch.save(checkpoint(fill_(net), "adapter"), tmp_path / "a.ckpt")
    printed = call(capsys, "info", tmp_path / "a.ckpt", "--for", "vllm")
    assert "refuses: '0.out_proj' belongs to '0', which has q, k and v apart" in printed
    assert "first" not in json.loads(call(capsys, "info", tmp_path / "a.ckpt", "--for", "vllm", "--json"))


@pytest.mark.parametrize(
    "options",
    [{"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}, {"r": "x", "lora_alpha": []}, {"lora_alpha": 10**400}],
)
def test_damaged_options_are_refused_or_looked_at_without_a_traceback(tmp_path, capsys: Any, options: dict[str, Any]):
    save_adapter(fill_(ours("llama")), tmp_path)
    edit(tmp_path, **options)
    for server in get_args(Server):
        assert main(["info", str(tmp_path), "--for", server]) in (0, 1)
        assert "Traceback" not in capsys.readouterr().err
    assert config_of(tmp_path)["peft_type"] == "LORA"
