"""Start an adapter from the Trainer's training batches, without using one of them up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from ..config import FROM_DATA
from ..distributed.sharding import detached
from ..distributed.zero import update_copies_
from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel
from ..start.batches import Caller, Run
from ..start.from_data import start_from_batches
from .deepspeed_optimizer import held_parameters
from .lightning_packages import package_of

GRADIENT_BATCHES = 8  # the mean gradient over so many batches
INSTEAD = "call inject(module, config) and initialize_from_data(module, batches, forward) before fit"
SLOW = "More training data, or a smaller r, would do"


def start_from_data(trainer: Any, module: Any, handle: AdaptedModel | None) -> None:
    """Initialise the adapter from training data where its options say so, and nothing was trained or loaded yet.

    The batches come from new iterators over the Trainer's loaders. They go through training_step in eval mode, without
    logging. Random streams, generators and metrics are restored. Collective.

    Raises:
        LoRAError: the data can be read only once, or training_step cannot be called without training.
    """
    if handle is None or handle.record.config.init_lora_weights not in FROM_DATA or trainer.global_step:
        return
    if handle.record.started or not all(layer.is_initial() for layer in handle.layers.values() if layer.kind()):
        return
    option = f"LoRACallback: init_lora_weights={handle.record.config.init_lora_weights!r}"
    if not module.automatic_optimization:
        raise LoRAError(f"{option}: training_step trains by itself, with manual optimization; {INSTEAD}.")
    if type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
        raise LoRAError(f"{option}: training_step takes dataloader_iter, and so would use batches up; {INSTEAD}.")
    package = package_of(type(trainer)) or "lightning.pytorch"
    loader = _own_loader(trainer, package, option)
    with _random_state(loader, package), _metrics_state(module), _without_logging(module):
        batches = _on_device(trainer, loader)
        caller = Caller(option, "training_step", SLOW)
        if handle.record.config.has_start:
            run = Run(islice(batches, GRADIENT_BATCHES), partial(_loss, trainer), caller=caller)
        else:
            run = Run(batches, partial(_forward, trainer), caller=caller)
        start_from_batches(handle, run)
    held = (parameter for optimizer in trainer.optimizers for parameter in held_parameters(optimizer))
    update_copies_((parameter, detached(parameter)) for parameter in held)


def _own_loader(trainer: Any, package: str, option: str) -> Any:
    """Return a loader of the training batches with iterators of its own."""
    loaders = trainer.fit_loop._combined_loader
    own = import_module(f"{package}.utilities.combined_loader").CombinedLoader(loaders.iterables, loaders._mode)
    for loader in own.flattened:
        if isinstance(loader, Iterator):
            raise LoRAError(
                f"{option}: the training data is an iterator, of which batches would be used up; {INSTEAD}."
            )
    own.flattened = list(map(_with_own_workers, own.flattened))
    return own


def _with_own_workers(loader: Any) -> Any:
    """Return a loader without the iterator that persistent workers keep: the Trainer goes on with that one."""
    if getattr(loader, "_iterator", None) is None:
        return loader
    own = copy.copy(loader)
    own._iterator = None
    return own


def _on_device(trainer: Any, loader: Any) -> Iterator[Any]:
    """Yield the batches of at most one epoch, as training_step gets them."""
    for number, (batch, _, _) in enumerate(loader):
        if number >= trainer.num_training_batches:
            return
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _forward(trainer: Any, module: nn.Module, batch: Any) -> object:
    return trainer.strategy.training_step(*_arguments(trainer, batch))


def _loss(trainer: Any, module: nn.Module, batch: Any) -> object:
    """Run training_step without the strategy's wrapper: DDP would wait for gradients of the adapter."""
    with trainer.precision_plugin.train_step_context():
        return trainer.lightning_module.training_step(*_arguments(trainer, batch))


def _arguments(trainer: Any, batch: Any) -> list[Any]:
    """Return the arguments of training_step for a batch."""
    return list(trainer.fit_loop.epoch_loop._build_kwargs({}, batch, 0).values())


@contextmanager
def _random_state(loader: Any, package: str) -> Iterator[None]:
    """Restore the random streams, and the generators of loaders and samplers, after the block."""
    holders = [part for each in loader.flattened for part in (each, *_samplers(each))]
    generators = [part.generator for part in holders if isinstance(getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with import_module(f"{package}.utilities.seed").isolate_rng():
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [each for each in found if each is not None]


@contextmanager
def _metrics_state(module: nn.Module) -> Iterator[None]:
    """Restore the state of every metric of a module after the block."""
    states = {metric: copy.deepcopy(vars(metric)) for metric in module.modules() if isinstance(metric, Metric)}
    try:
        yield
    finally:
        for metric, state in states.items():
            vars(metric).update(state)


@contextmanager
def _without_logging(module: nn.Module) -> Iterator[None]:
    """Let self.log do nothing during the block, in every LightningModule inside `module`."""
    with ExitStack() as stack:
        for part in module.modules():
            for name in ("log", "log_dict"):
                if hasattr(type(part), name) and name not in vars(part):
                    setattr(part, name, _log_nothing)
                    stack.callback(delattr, part, name)
        yield


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for LightningModule.log and log_dict."""
