"""LoRACallback, which calls the functions of this package at the right moments of a Trainer's life."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from .config import (
    DEFAULT_VARIANT,
    Bias,
    Init,
    LoRAConfig,
    PeftConfig,
    Task,
    as_config,
    is_config,
    refuse_unknown_option,
)
from .errors import LoRAError, sentence
from .formats.lightning_checkpoint import Kind
from .matching import ALL_LINEAR
from .model.adapted_model import Listing, find_adapted
from .model.recorded_layers import refuse_replaced_layers
from .trainer.after_fit import merge_for_good
from .trainer.checkpoint_hooks import save_as_where_unpatched
from .trainer.evaluation import end_evaluation, merge_to_evaluate, warn_of_untrained_adapter
from .trainer.fabric import refuse_callback
from .trainer.fit_start import check_fit, open_for_fit, record_fit
from .trainer.lightning_packages import become_callback, first_package
from .trainer.options import check_own_options
from .trainer.run_hooks import begin_batch, begin_epoch, break_off, close_fit, end_batch, end_fit, leave
from .trainer.run_state import injection_of
from .trainer.setup import set_up, stop_adapting
from .trainer.start_batches import start_from_data
from .trainer.strategies import prepare_strategy
from .trainer.untrained import look_for_gradients, look_for_reads

Method = TypeVar("Method", bound=Callable[..., None])

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = first_package().Callback


def _noting_options(init: Method) -> Method:
    """Let __init__ note which options were given, even those that were given at their defaults.

    A command line (LightningCLI) gives every option. There, those that differ from their defaults count as given.
    """
    defaults: dict[str, Any] = cast(Any, init).__kwdefaults__

    @functools.wraps(init)
    def noting(self: LoRACallback, *config: LoRAConfig | PeftConfig, **options: Any) -> None:
        refuse_unknown_option("LoRACallback: an option", options, defaults)
        filled_in = options.keys() >= defaults.keys()
        self.given = frozenset(name for name in options if not filled_in or options[name] != defaults[name])
        init(self, *config, **options)

    return cast(Method, noting)


class LoRACallback(Callback):
    """Adapt any LightningModule with LoRA: inject on setup, merge while evaluating, save small checkpoints.

    Beside its own options it takes LoRAConfig's. An option that is left out is taken from the model, if that was
    injected already, or else from the checkpoint at ckpt_path; one that is given must fit them. A LoRAConfig gives all
    options. In LightningCLI's configs an option at its default counts as left out.

    Args:
        config: at most one: a LoRAConfig, or a peft.LoraConfig, instead of its options one by one.
        r: rank of A (r, in) and B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r.
        lora_dropout: probability of dropping a feature of the adapter's input in training mode.
        target_modules: the layers to adapt: a list of names, a regular expression, "all-linear" or "all-layers".
        exclude_modules: layers to leave alone even if target_modules names them.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        merged_eval: merge for validation, test and prediction, and unmerge after.
        save: what a checkpoint holds: "adapter", "merged" or "full".
        rank_pattern: another r for some layers, such as {"q_proj": 16}.
        alpha_pattern: another lora_alpha for some layers, with keys as in rank_pattern.
        bias: which biases are trained: "none", "all", or "lora_only", which is those of adapted layers.
        use_rslora: scale by s = lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
        use_dora: DoRA (arXiv:2402.09353): scale each output's weights W + s * B @ A to a trained magnitude.
        variant: what an adapter stores and adds to the weight: "lora", "dora", "loha" or one of your own.
        variant_options: options of your own variant, by name.
        init_lora_weights: how A and B start: True, False, "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga".
        task_type: what the model is for, as in PEFT's files, such as "SEQ_CLS" or "CAUSAL_LM".
        target_parameters: single parameters to adapt, by name or dotted suffix, such as weights of nn.LSTM.
        trainable_token_indices: rows of embeddings or output heads to train, such as those of new tokens.
        layers_to_transform: the number or numbers of the layers (blocks) in which target_modules adapts modules.
        layers_pattern: the name segment that the layer's number follows, such as "layers".
        enable_lora: which of the equal parts of a fused projection are adapted, such as {"qkv": [True, False, True]}.
        autocast_adapter_dtype: keep adapters of float16 and bfloat16 layers in float32.
        seed: an integer that seeds the adapters' initial values.
        attach: frozen adapters to attach, by name, such as {"sft": "folder"}.
        merge_after_fit: leave plain layers with merged weights when fit ends.
        quantize: quantize the base's linear layers in setup, before they are adapted (QLoRA): "nf4".
        dequantize: dtype of the plain weights that replace quantized ones, for save="merged" and merge_after_fit.
        verbose: show the summary at fit start.

    Raises:
        LoRAError: a value is not allowed; the message holds it.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(max_steps=2, callbacks=[LoRACallback(r=1)], barebones=True)
        >>> trainer.fit(model := BoringModel())
        >>> trainer.save_checkpoint("adapter.ckpt")
        >>> print(*torch.load("adapter.ckpt", weights_only=True)["state_dict"])
        layer.lora_A layer.lora_B
    """

    given: frozenset[str]  # the options that were given

    @_noting_options
    def __init__(
        self,
        *config: LoRAConfig | PeftConfig,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        exclude_modules: str | Sequence[str] | None = None,
        modules_to_save: Sequence[str] | None = None,
        merged_eval: bool = True,
        save: Kind = "adapter",
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        bias: Bias = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        variant: str = DEFAULT_VARIANT,
        variant_options: Mapping[str, Any] | None = None,
        init_lora_weights: bool | Init | str = True,
        task_type: Task | None = None,
        target_parameters: Sequence[str] | None = None,
        trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        enable_lora: Mapping[str, Sequence[bool]] | None = None,
        autocast_adapter_dtype: bool = True,
        seed: int | None = None,
        attach: Mapping[str, Any] | None = None,
        merge_after_fit: bool = False,
        quantize: str | None = None,
        dequantize: str | torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        self.config = _one_config(config, locals(), self.given)
        self.given |= {field.name for field in fields(LoRAConfig)} if config else set()
        self.merged_eval = merged_eval
        self.save = save
        self.seed = seed
        self.attach = attach
        self.merge_after_fit = merge_after_fit
        self.quantize = quantize
        self.dequantize = dequantize
        self.verbose = verbose
        check_own_options(self)

    def __repr__(self) -> str:
        parameters = inspect.signature(LoRACallback).parameters
        own = {name: p.default for name, p in parameters.items() if name not in ("config", *vars(self.config))}
        given = {name: getattr(self.config, name) for name in self.config.differing(LoRAConfig())}
        given |= {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # --- in the order in which Lightning calls them ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt layers before the optimizer is built and the strategy wraps; patch the method that builds others."""
        prepare_strategy(trainer.strategy, self.save)
        set_up(trainer, pl_module, self, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the adapter can be trained, record the base's fingerprint, show what is trained, log options."""
        handle = open_for_fit(pl_module)
        handle.injection.fits += 1
        check_fit(trainer, handle, self)
        record_fit(trainer, handle, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from data where the options say so."""
        start_from_data(trainer, pl_module, find_adapted(pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that no hook has replaced adapted layers; let the first batch look at what was unfrozen."""
        refuse_replaced_layers(Listing(pl_module), "LoRACallback")
        begin_epoch(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the strategy's setup, or a hook, has not replaced adapted layers; warn of an untrained adapter."""
        refuse_replaced_layers(Listing(pl_module), "LoRACallback")
        warn_of_untrained_adapter(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Unmerge what is merged, and let dropout act in layers that Lightning keeps in eval mode."""
        begin_batch(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Before an optimizer's first step, warn of adapters that have no gradient."""
        look_for_gradients(trainer.optimizers, optimizer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Let dropout follow each layer's own mode."""
        end_batch(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Merge at the first batch, because weight averaging swaps weights after the start hooks."""
        if self.merged_eval:
            merge_to_evaluate(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unmerge, before weight averaging swaps weights back; warn of attached adapters that no forward has read."""
        look_for_reads(trainer, pl_module)
        end_evaluation(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Patch the module's own hook where setup did not run: in the main process of a launcher.

        The checkpoint is made small in that hook (trainer/checkpoint_hooks.py), and not here: Lightning calls
        callbacks' hooks first, and with save_weights_only=True not at all.
        """
        save_as_where_unpatched(pl_module, self.save, self.dequantize)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit came to its end."""
        end_fit(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unmerge after an exception or Ctrl-C, which skips the epoch's end and teardown."""
        try:
            break_off(pl_module, exception)
        except LoRAError as error:  # of a sharded forward that cannot be left; the exception is what the user must see
            rank_zero_warn(f"LoRACallback: the model stays merged: {sentence(error)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unmerge what is merged still.

        A merge for good comes last, when every checkpoint of the fit is written and averaged weights are in place.
        """
        injection = injection_of(pl_module)
        leave(pl_module)
        stop_adapting(pl_module)
        if stage == "fit" and injection is not None and close_fit(injection) and self.merge_after_fit:
            merge_for_good(pl_module)

    def on_after_setup(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be in Fabric's list: Fabric calls this hook, and none of a Trainer's."""
        refuse_callback(self.config)

    on_after_optimizer_step = on_after_setup  # which Fabric calls where the model came from setup_module


def _one_config(
    configs: Sequence[LoRAConfig | PeftConfig], arguments: Mapping[str, Any], given: Collection[str]
) -> LoRAConfig:
    """Return the config that was given, whole or option by option, never both. `given` names the single options."""
    options = {field.name: arguments[field.name] for field in fields(LoRAConfig)}
    if not configs:
        return LoRAConfig(**options)
    if len(configs) > 1 or not is_config(configs[0]):
        types = ", ".join(type(config).__name__ for config in configs)
        raise LoRAError(f"LoRACallback: expected one LoRAConfig or options by their names, found {types}.")
    repeated = [name for name in options if name in given]
    if repeated:
        raise LoRAError(f"LoRACallback: {', '.join(repeated)} given with a LoRAConfig; write it in the LoRAConfig.")
    return as_config(configs[0])


become_callback(LoRACallback)
