"""A CTC model of NeMo under the callback: names stay, an adapter is loaded again, and NeMo restores merged weights."""

import lightning as L
import torch
from nemo.collections.asr.models import EncDecCTCModel
from nemo.utils import logging
from omegaconf import OmegaConf

from lightning_lora import LoRACallback, load_adapter, merge_and_unload


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        audio = torch.randn(8000, generator=torch.Generator().manual_seed(index))
        return audio, torch.tensor(8000), torch.tensor([index % 2, 2]), torch.tensor(2)  # audio, text, their lengths


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_signal=torch.ones(1, 8000), input_signal_length=torch.tensor([8000]))[0]


logging.setLevel(logging.ERROR)
part = "nemo.collections.asr.modules."
config = {
    "preprocessor": {"_target_": part + "AudioToMelSpectrogramPreprocessor"},
    "encoder": {"_target_": part + "ConformerEncoder", "feat_in": 64, "n_layers": 2, "d_model": 32},
    "decoder": {"_target_": part + "ConvASRDecoder", "feat_in": 32, "num_classes": 3, "vocabulary": ["a", "b", " "]},
    "optim": {"name": "adamw", "lr": 0.01},
}
torch.manual_seed(0)
EncDecCTCModel(OmegaConf.create(config)).save_to("base.nemo")  # this line stands in for a pretrained model

net = EncDecCTCModel.restore_from("base.nemo", map_location="cpu")
names = set(net.state_dict())
lora = LoRACallback(r=8, lora_alpha=16, target_modules=["linear_q", "linear_v"])
data = torch.utils.data.DataLoader(Noise(), batch_size=4)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[lora], **quiet)
trainer.fit(net, data, data)
assert {name for name in net.state_dict() if "lora_" not in name} == names
trainer.save_checkpoint("lora.ckpt")
again = EncDecCTCModel.restore_from("base.nemo", map_location="cpu")
load_adapter(again, "lora.ckpt")
assert torch.equal(outputs(again), outputs(net))
merge_and_unload(again).save_to("tuned.nemo")
tuned = EncDecCTCModel.restore_from("tuned.nemo", map_location="cpu")
assert torch.allclose(outputs(tuned), outputs(net), atol=1e-5)
