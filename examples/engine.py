"""Weights over the wire: an engine in another process takes the merged weights after each epoch, tensor by tensor.

A second one takes the adapter alone, at each tenth step.

pip install -e ".[examples]"
python examples/engine.py

Loops of reinforcement learning do this: one process trains, another one serves. The engine here is a plain model that
knows nothing of LoRA. An engine that has the base and takes adapters needs a small part of the bytes.
"""

import codecs
import contextlib
import io
from multiprocessing.connection import Connection
from pathlib import Path

import lightning as L
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, load_adapter, merged_tensors, save_merged, take_adapter
from small_models import encode, manual_llama

ADAPTER_EVERY = 10  # steps
RUNS = Path(__file__).with_name("runs")

with contextlib.redirect_stdout(io.StringIO()):
    import this  # prints itself when it is imported
ZEN = codecs.decode(this.s, "rot13")


def engine(wire: Connection) -> None:
    """Load each tensor that comes; at "loss" send the loss of the Zen of Python, at "weights" send all weights."""
    torch.set_num_threads(1)
    network = LlamaForCausalLM.from_pretrained(manual_llama()).eval()
    tokens = encode(ZEN)[None, :128]
    while (message := wire.recv()) != "end":
        with torch.no_grad():
            if message == "loss":
                wire.send(float(network(input_ids=tokens, labels=tokens).loss))
            elif message == "weights":
                wire.send({name: tensor.numpy() for name, tensor in network.state_dict().items()})
            else:
                name, tensor = message
                network.get_parameter(name).copy_(tensor)


def engine_of_adapters(wire: Connection) -> None:
    """Put each adapter that comes onto the base, in place of the last one, and send the loss of the Zen of Python."""
    torch.set_num_threads(1)
    network = LlamaForCausalLM.from_pretrained(manual_llama()).eval()
    tokens = encode(ZEN)[None, :128]
    while (adapter := wire.recv()) != "end":
        load_adapter(network, adapter)
        with torch.no_grad():
            wire.send(float(network(input_ids=tokens, labels=tokens).loss))


class LanguageModel(L.LightningModule):
    def __init__(self, wire: Connection, wire_of_adapters: Connection) -> None:
        super().__init__()
        self.wire, self.wire_of_adapters = wire, wire_of_adapters
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def training_step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def on_train_batch_end(self, *args: object) -> None:
        if self.global_step % ADAPTER_EVERY == 0:
            adapter = take_adapter(self.model)  # a copy, with its options; A and B alone are adapter.tensors
            self.wire_of_adapters.send(adapter)
            loss, sent = self.wire_of_adapters.recv(), sum(tensor.nbytes for tensor in adapter.tensors.values())
            whole = sum(tensor.nbytes for tensor in self.model.state_dict().values()) - sent
            print(f"step {self.global_step}: {sent / whole:.0%} of the bytes, loss with the adapter {loss:.2f}")

    def on_train_epoch_end(self) -> None:
        count = 0
        for name, tensor in merged_tensors(self.model):  # the model itself stays factored, and trains on
            self.wire.send((name, tensor))
            count += 1
        print(f"epoch {self.current_epoch + 1}: {count} tensors, loss of the engine {self.loss_of_engine():.2f}")

    def loss_of_engine(self) -> float:
        self.wire.send("loss")
        loss: float = self.wire.recv()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def zen() -> DataLoader[Tensor]:
    """The Zen of Python, over and over, in pieces of 128 characters."""
    return DataLoader(encode(ZEN * 12).split(128)[:-1], batch_size=16, shuffle=True)


if __name__ == "__main__":
    L.seed_everything(0)
    manual_llama()  # is made here, before two processes want it
    wires, processes = [], []
    for target in (engine, engine_of_adapters):
        wire, end_of_engine = mp.Pipe()
        process = mp.get_context("spawn").Process(target=target, args=(end_of_engine,), daemon=True)
        process.start()
        wires.append(wire)
        processes.append(process)
    model = LanguageModel(*wires)
    print(f"before:  loss of the engine {model.loss_of_engine():.2f}")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=[LoRACallback(r=16, lora_alpha=32)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, zen())

    save_merged(model, RUNS / "engine")
    saved = load_file(RUNS / "engine" / "model.safetensors")
    wires[0].send("weights")
    served = {name: torch.from_numpy(array) for name, array in wires[0].recv().items()}
    same = served.keys() == saved.keys() and all(torch.equal(served[name], saved[name]) for name in saved)
    print(f"the engine has the weights of save_merged in every bit: {same}")
    for wire, process in zip(wires, processes, strict=True):
        wire.send("end")
        process.join()
