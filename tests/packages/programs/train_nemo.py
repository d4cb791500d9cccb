"""A CTC model of NeMo under the callback: names stay, an adapter is loaded again, and NeMo restores merged weights.

    with NeMo                                   here
    model.add_adapter(...)                      LoRACallback(r=8, target_modules=["linear_q", "linear_v"])
    model.freeze()                              may stay: BatchNorm then keeps its averages
    unfreeze_enabled_adapters, freeze_updates   leave them out: the callback freezes the base
    model.set_enabled_adapters(enabled=False)   with disable_adapter(model):
    model.save_adapters, model.load_adapters    save_adapter(model, path), load_adapter(model, path)
    model.change_vocabulary(...)                the same, before fit; and modules_to_save=["decoder"]
    exp_manager's save_nemo_on_train_end        false, and always_save_nemo too;
                                                after fit merge_and_unload(model).save_to("tuned.nemo")
    lora: {r: 8} of a SALM                      target_modules=["q_proj", "v_proj"]
                                                modules_to_save=["perception.modality_adapter", "perception.proj"]
    freeze_params of a SALM                     prevent_freeze_params: ['^.+\\.lora_.+$'] beside it

nemo_toolkit[asr] 3 takes Lightning 2.4. A SALM's lines were tried by hand.
"""

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
