"""A task of terratorch under the callback: names stay, and two of the three parts of each qkv are adapted.

Nothing is split or renamed, and the backbone is not wrapped in PEFT's model.

    with terratorch                             here
    peft_config={"method": "LORA", ...}         LoRACallback(r=8, ...) for the Trainer
    "replace_qkv": "qkv", "qkv.q_linear", ...   target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}
    decoder and head, which train as they are   modules_to_save=["decoder", "head"]
"""

import lightning as L
import torch
from terratorch.tasks import ClassificationTask

from lightning_lora import LoRACallback


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index)), "label": index % 3}


torch.manual_seed(0)
model = {
    "backbone": "timm_vit_tiny_patch16_224",
    "backbone_pretrained": False,
    "decoder": "IdentityDecoder",
    "num_classes": 3,
}
task = ClassificationTask(model_args=model, model_factory="EncoderDecoderFactory", loss="ce", lr=0.01)
names = set(task.state_dict())
lora = LoRACallback(r=8, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}, modules_to_save=["head"])
data = torch.utils.data.DataLoader(Scenes(), batch_size=2)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[lora], enable_checkpointing=False, **quiet)
trainer.fit(task, data, data)
kept = {name for name in task.state_dict() if "lora_" not in name}
assert kept == names
(lora_b, *_) = [value for name, value in task.state_dict().items() if name.endswith("qkv.lora_B")]
assert lora_b.shape == (384, 8)  # of 576 outputs
