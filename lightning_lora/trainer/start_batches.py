"""Start an adapter from the Trainer's training batches, without using one of them up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from ..config import FROM_DATA
from ..distributed.deepspeed_optimizer import held_parameters, update_copies_
from ..distributed.sharding import detached
from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel
from ..private.lightning import arguments_of_training_step, batches_again, can_read_batches, on_device
from ..start.batches import COUNT, learned_tokens
from ..start.from_data import start_from_batches
from .lightning_packages import package_of

GRADIENT_BATCHES = 8  # the mean gradient over so many batches


def start_from_data(trainer: Any, module: Any, handle: AdaptedModel | None) -> None:
    """Initialise the adapter from training data where its options say so, and nothing was trained or loaded yet.

    The batches come from new iterators over the Trainer's loaders. They go through training_step in eval mode, without
    logging. Random streams, generators and metrics are restored. Collective.

    Raises:
        LoRAError: the data can be read only once, or training_step cannot be called without training.
    """
    if handle is None or handle.injection.config.init_lora_weights not in FROM_DATA or trainer.global_step:
        return
    if "started" in handle.injection.marks or not all(
        layer.is_initial() for layer in handle.layers.values() if layer.kind()
    ):
        return
    if not module.automatic_optimization or not can_read_batches(trainer, module):
        raise LoRAError(
            f"LoRACallback: init_lora_weights={handle.injection.config.init_lora_weights!r}: under manual "
            "optimization, with dataloader_iter, or with an iterator as data, no batch can be read before training. "
            "Call inject(module, config) and initialize_from_data(module, batches, forward) before fit."
        )
    loader = batches_again(trainer)
    gradients = handle.injection.config.has_start

    def forward(model: nn.Module, batch: Any) -> object:
        arguments = arguments_of_training_step(trainer, batch)
        if not gradients:
            return trainer.strategy.training_step(*arguments)
        with trainer.precision_plugin.train_step_context():  # DDP's wrapper would wait for gradients of the adapter
            return module.training_step(*arguments)

    package = package_of(type(trainer)) or "lightning.pytorch"
    with import_module(f"{package}.utilities.seed").isolate_rng(), _undisturbed(module, loader):
        n = min(GRADIENT_BATCHES if gradients else COUNT, trainer.num_training_batches)
        batches = (on_device(trainer, module, batch) for batch, _, _ in loader)
        start_from_batches(handle, batches, forward, learned_tokens, n)
    held = (parameter for optimizer in trainer.optimizers for parameter in held_parameters(optimizer))
    update_copies_((parameter, detached(parameter)) for parameter in held)


@contextmanager
def _undisturbed(module: nn.Module, loader: Any) -> Iterator[None]:
    """Let self.log do nothing inside; afterwards generators of loaders, samplers and metrics are as before."""
    generators = {generator: generator.get_state() for each in loader.flattened for generator in _generators(each)}
    metrics = {part: copy.deepcopy(vars(part)) for part in module.modules() if isinstance(part, Metric)}
    names = {"log", "log_dict"}
    logging = [part for part in module.modules() if hasattr(type(part), "log_dict") and not names & vars(part).keys()]
    for part in logging:
        vars(part).update(dict.fromkeys(names, _log_nothing))
    try:
        yield
    finally:
        for part in logging:
            for name in names:
                delattr(part, name)
        for metric, values in metrics.items():
            vars(metric).update(values)
        for generator, state in generators.items():
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for LightningModule.log and log_dict."""
