"""litgpt's GPT under the callback: a checkpoint is loaded again, and merged weights have litgpt's names.

Names are those of lit_model.pth. litgpt's commands have training loops of their own, and take no callback.

    with litgpt                                 here
    from litgpt.lora import GPT, Config         from litgpt import GPT, Config
    Config.from_name(..., lora_r=8)             LoRACallback(r=8, lora_alpha=16, ...)
    lora_query=True, lora_value=True            target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}
    with fewer groups of keys than heads        target_modules=["qkv"], whose parts have unequal sizes
    lora_projection, lora_mlp, lora_head        "attn.proj"; "fc_1", "fc_2", "mlp.proj" (or "fc"); "lm_head"
    merge_lora_weights(model)                   merge_and_unload(model)

No server reads litgpt's names: save the merged state dict as lit_model.pth, for litgpt convert_from_litgpt.
"""

import lightning as L
import torch
from litgpt import GPT, Config

from lightning_lora import LoRACallback, load_from_checkpoint, merge_and_unload


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)  # this line stands in for loading lit_model.pth
        self.model = GPT(Config.from_name("pythia-14m"))

    def training_step(self, tokens):
        logits = self.model(tokens)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def validation_step(self, tokens):
        self.log("loss", self.training_step(tokens))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


tokens = (torch.arange(8)[:, None] + torch.arange(16)) % 64
data = torch.utils.data.DataLoader(tokens, batch_size=4)
lora = LoRACallback(r=8, lora_alpha=16, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]})
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[lora], **quiet)
net = Net()
trainer.fit(net, data, data)
trainer.save_checkpoint("litgpt.ckpt")
again = load_from_checkpoint(Net, "litgpt.ckpt")
assert torch.equal(again.model(tokens), net.model(tokens))
plain = merge_and_unload(net).model.state_dict()
assert plain.keys() == GPT(Config.from_name("pythia-14m")).state_dict().keys()
