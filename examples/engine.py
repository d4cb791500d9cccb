"""Weights over the wire: an engine in another process takes the merged weights after each epoch, tensor by tensor.

pip install -e ".[examples]"
python examples/engine.py

Loops of reinforcement learning do this: one process trains, another one serves. The engine here is a plain model that
knows nothing of LoRA.
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

from lightning_lora import LoRACallback, merged_tensors, save_merged
from small_models import encode, manual_llama

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


class LanguageModel(L.LightningModule):
    def __init__(self, wire: Connection) -> None:
        super().__init__()
        self.wire = wire
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def training_step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

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
    wire, end_of_engine = mp.Pipe()
    process = mp.get_context("spawn").Process(target=engine, args=(end_of_engine,), daemon=True)
    process.start()
    model = LanguageModel(wire)
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
    wire.send("weights")
    served = {name: torch.from_numpy(array) for name, array in wire.recv().items()}
    same = served.keys() == saved.keys() and all(torch.equal(served[name], saved[name]) for name in saved)
    print(f"the engine has the weights of save_merged in every bit: {same}")
    wire.send("end")
    process.join()
