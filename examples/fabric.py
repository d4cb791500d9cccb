"""Fabric: your own training loop, on two processes, evaluated merged, saved without the base, resumed to the same bits.

pip install -e ".[examples]"
python examples/fabric.py

By default each process holds the whole model (DDP). With `--strategy fsdp2` it holds half of each weight.
"""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_adapter, merged, take_adapter
from small_models import encode, manual_llama

LORA = LoRAConfig(r=16, lora_alpha=32)
EPOCHS, BATCH = 2, 8


def prepare(fabric: Fabric) -> tuple[nn.Module, Any]:
    """Inject first: then the strategy sends, or shards, the adapter with the rest."""
    model: nn.Module = LlamaForCausalLM.from_pretrained(manual_llama())
    inject(model, LORA)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    return model, fabric.setup_optimizers(optimizer)


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Shard block by block, as FSDP2 wants it."""
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def train(fabric: Fabric, model: nn.Module, optimizer: Any, epoch: int) -> None:
    for tokens in batches(fabric, epoch):
        optimizer.zero_grad()
        fabric.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()


def evaluate(fabric: Fabric, model: nn.Module) -> float:
    """Evaluate at the speed of the plain model; every bit of the base is back afterwards."""
    tokens = python_code()[640 + fabric.global_rank : 704 : fabric.world_size]
    with torch.no_grad(), merged(model):
        loss = fabric.all_reduce(model(input_ids=tokens, labels=tokens).loss)
    return cast(Tensor, loss).item()


def save(fabric: Fabric, model: nn.Module, optimizer: Any, epoch: int) -> None:
    """Save what training changes, and the optimizer; the base is not in the file."""
    names = set(adapter_state_dict(model))
    state = {"model": model, "optimizer": optimizer, "epoch": epoch}
    fabric.save(checkpoint(epoch), state, filter={"model": lambda name, _: name in names})


def checkpoint(epoch: int) -> Path:
    """A file for each epoch: Fabric may still use the file that it has loaded."""
    return Path(__file__).with_name("runs") / f"fabric-{epoch}.ckpt"


def batches(fabric: Fabric, epoch: int) -> Iterator[Tensor]:
    """This process's part of an epoch, in an order that depends on the epoch alone."""
    pieces = python_code()[:640]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(epoch))
    for step in order.view(-1, BATCH * fabric.world_size):
        yield pieces[step[fabric.global_rank :: fabric.world_size]]


def python_code() -> Tensor:
    """The source of argparse, in pieces of 128 characters."""
    return encode(inspect.getsource(argparse)).unfold(0, 128, 128)


if __name__ == "__main__":  # each of the two processes runs all of this
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    name = parser.parse_args().strategy
    manual_llama()  # once, before the second process is there
    checkpoint(0).parent.mkdir(exist_ok=True)
    fsdp2 = ModelParallelStrategy(shard, 2, 1, save_distributed_checkpoint=False)  # else no filter is taken
    fabric = Fabric(accelerator="cpu", devices=2, strategy=fsdp2 if name == "fsdp2" else "ddp")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    model, optimizer = prepare(fabric)
    before = evaluate(fabric, model)
    for epoch in range(EPOCHS):
        train(fabric, model, optimizer, epoch)
        save(fabric, model, optimizer, epoch)
    after = evaluate(fabric, model)
    uninterrupted = take_adapter(model)

    model, optimizer = prepare(fabric)  # as a new program would
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    fabric.load(checkpoint(0), state, strict=False)  # the base is not in the file, and stays as it is
    for epoch in range(state["epoch"] + 1, EPOCHS):
        train(fabric, model, optimizer, epoch)
    resumed = take_adapter(model)

    if fabric.is_global_zero:
        same = all(torch.equal(resumed.tensors[name], tensor) for name, tensor in uninterrupted.tensors.items())
        print(f"loss on Python code: {before:.2f} before, {after:.2f} after")
        print(f"resumed after an epoch, the same adapter to the last bit: {same}")
        names = list(torch.load(checkpoint(1))["model"])
        print(f"{len(names)} tensors of the model are saved, such as {names[0]}")
        plain = LlamaForCausalLM.from_pretrained(manual_llama())  # in one process, without Fabric
        inject(plain, LORA)
        load_adapter(plain, checkpoint(1))
        tokens = python_code()[640:704]
        with torch.no_grad():
            print(f"loss in one process, without Fabric: {plain(input_ids=tokens, labels=tokens).loss:.2f}")
