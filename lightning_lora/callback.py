"""LoRACallback, which calls the functions of this package at the right moments of a Trainer's life."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from .arguments import names_near_misses
from .config import LEAVE_OUT, PLAIN, Bias, Init, LoRAConfig, PeftConfig, Task, as_config, is_config
from .errors import LoRAError
from .formats.lightning_checkpoint import Kind
from .matching import ALL_LINEAR
from .model.adapted_model import Listing
from .model.recorded_layers import refuse_replaced_layers
from .trainer.after_fit import merge_for_good
from .trainer.by_module import ByModule
from .trainer.checkpoint_hooks import export_where_launched, save_as_where_unpatched
from .trainer.fabric import refuse_callback
from .trainer.fit_start import check_fit, open_for_fit, record_fit, start_training
from .trainer.fit_state import FitState
from .trainer.late_layers import adapt_late_layers, stop_adapting
from .trainer.lightning_packages import become_callback, first_package
from .trainer.options import check_own_options
from .trainer.setup import set_up
from .trainer.strategies import prepare_strategy

ELSEWHERE = {
    **LEAVE_OUT,
    **dict.fromkeys(["log_stats", "log_plots"], "use LoRAMonitor(every_n_steps=..., plots=...)"),
    "config": "give it by position: LoRACallback(LoRAConfig(...))",
}
KEYWORD = inspect.Parameter.KEYWORD_ONLY
Method = TypeVar("Method", bound=Callable[..., None])

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = first_package().Callback


def _noting_options(init: Method) -> Method:
    """Let __init__ note which options were given, even those that were given at their defaults.

    A command line (LightningCLI) gives every option. There, those that differ from their defaults count as given.
    """
    defaults = {name: each.default for name, each in inspect.signature(init).parameters.items() if each.kind is KEYWORD}

    @functools.wraps(init)
    def noting(self: LoRACallback, *config: LoRAConfig | PeftConfig, **options: Any) -> None:
        filled_in = options.keys() >= defaults.keys()
        self.given = frozenset(o for o in options if not filled_in or options[o] != defaults.get(o))
        init(self, *config, **options)

    return cast(Method, noting)


@names_near_misses("LoRACallback", ELSEWHERE)
class LoRACallback(Callback):
    """Adapt any LightningModule with LoRA: inject on setup, merge while evaluating, save small checkpoints.

    The options after `verbose` are LoRAConfig's. Where the user has injected the model already, an option that is given
    must equal the model's, and an option that is left out is taken from the model. A LoRAConfig gives all options. In
    LightningCLI's configs, where defaults are filled in, an option at its default counts as left out.

    Args:
        config: at most one: a LoRAConfig, or a peft.LoraConfig, instead of its options one by one.
        merged_eval: merge for validation, test and prediction, and unmerge after.
        save: what a checkpoint holds: "adapter" (what training changes), "merged" (plain weights for programs without
            this package, and the adapter beside them) or "full" (base and adapter).
        verify: on the first evaluation batch, compare each layer's merged and factored output and log the error. Layers
            that never ran, or whose adapter had no effect, are named in a warning.
        seed: a whole number that the adapters are drawn from. Without one they are drawn from the state of torch's
            random stream at setup, which is not advanced: a run that is started again draws the same adapters, and so
            do two runs in a row. Members of an ensemble need seeds of their own.
        merge_after_fit: leave plain layers with merged weights behind when fit ends, so that a library that saves the
            model itself saves what was trained. The model is then evaluated as it is, and loads merged checkpoints
            only.
        quantize: quantise the base's linear layers in setup, before they are adapted (QLoRA): "nf4", as quantize_base
            does. exclude_modules, modules_to_save, task_type and trainable_token_indices leave layers out. None leaves
            the base as it is, quantised or not.
        dequantize: dtype of the plain weights that take the place of quantised ones, for save="merged" and
            merge_after_fit: "bfloat16", "float16", "float32" or a torch.dtype.
        lr_ratio: LoRA+ (arXiv:2402.12354): the ratio of B's learning rate to A's, such as 16, for an optimizer that
            LightningCLI makes (--optimizer). In your own configure_optimizers, call lora_param_groups instead.
        verbose: show the summary at fit start, and explain Lightning's warning of modules in eval mode. This package's
            own warnings come in any case.
        r: rank of A (r, in) and B (out, r). An adapter with more parameters than its layer, as every r above the
            layer's smaller side gives, is named in one warning at fit start, and in a log line of inject.
        lora_alpha: numerator of the scaling s = lora_alpha / r.
        lora_dropout: probability of dropping a feature of the adapter's input in training mode. Under LoRACallback a
            layer that is kept in eval mode drops too, in training batches where gradients are recorded.
        target_modules: the layers to adapt. A list holds whole names or dotted suffixes of names. A string is a regular
            expression that must match a whole name. "all-linear" is every linear layer and transformers' Conv1D,
            without the output head and without tied weights. "all-layers" is these, all convolutions and
            nn.MultiheadAttention, without what a PEFT file cannot hold, such as convolutions with groups.
        target_parameters: single parameters to adapt, by name or dotted suffix: weights of nn.LSTM and nn.GRU, stacks
            of experts (E, m, n), and any matrix that its module's forward reads. target_modules may then be empty, and
            lora_dropout must be 0, as in PEFT.
        exclude_modules: layers to leave alone although target_modules names them.
        layers_to_transform: the number or numbers of the layers (blocks) in which target_modules, which must then be a
            list, adapts modules. A module that is listed by its full name is adapted in any layer. A layer's number is
            the first number in the module's name that has at least two segments before it, such as the 1 of
            "model.layers.1.q_proj".
        layers_pattern: the name segment that the layer's number follows, such as "layers". A regular expression, or
            several.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        trainable_token_indices: rows of embeddings or output heads to train, such as those of new tokens. The other
            rows stay frozen, and a tied head follows. A list is for the input embeddings; a mapping gives a list for
            each name or dotted suffix.
        task_type: what the model is for, as in PEFT's files. "SEQ_CLS" and "TOKEN_CLS" add "classifier" and "score" to
            modules_to_save, "QUESTION_ANS" adds "qa_outputs", where the model has them. "SEQ_2_SEQ_LM", "CAUSAL_LM" and
            "FEATURE_EXTRACTION" add nothing.
        ensure_weight_tying: keep a weight tied that a module of modules_to_save shares with another module, and train
            it for both. False, which is PEFT's default, means two weights. It is refused where they are one weight:
            untie them first.
        rank_pattern: another r for some layers, such as {"q_proj": 16}. Keys are regular expressions over a dotted
            suffix of the name.
        alpha_pattern: another lora_alpha for some layers, with keys as in rank_pattern.
        bias: which biases are trained: "none", "all", or "lora_only", which is those of adapted layers.
        use_rslora: scale by s = lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
        use_dora: DoRA (arXiv:2402.09353): scale each output's weights W + s * B @ A to a trained magnitude. For linear
            layers, transformers' Conv1D, convolutions and nn.Embedding.
        variant: what an adapter stores and what it adds to the weight: "lora", "dora" (the same as use_dora), "vera"
            (arXiv:2310.11454), "loha" (arXiv:2108.06098), or the name of a variant of your own whose file was imported.
        variant_options: options that this variant alone has, by name, such as {"d_initial": 0.1} of "vera".
        init_lora_weights: how A and B start. True: A is random (Kaiming uniform) and B zero, so training starts from
            the base; an embedding's A is zero and its B normal. "gaussian": A is normal with deviation 1 / r, and B
            zero. "orthogonal": neither is zero, but B @ A is; r must be even. False: both are random, which changes the
            outputs at once. Three values start from the weight, which itself stays as it is: W' = W + s * (B @ A - B0 @
            A0). "pissa" takes A0 and B0 from its largest singular values (arXiv:2404.02948), "pissa_niter_4" from 4
            steps of subspace iteration, which is much faster for large layers, and "olora" from its QR decomposition
            (arXiv:2406.01775). Two values start from training data, at fit start or by initialize_from_data. "eva"
            takes A from the layer's inputs, and B is zero (arXiv:2410.07170). "lora_ga" takes A0 and B0 from the
            gradients of the weight (arXiv:2407.05000).
        enable_lora: which of the equal parts of a fused projection are adapted, such as {"qkv": [True, False, True]}
            (loralib's MergedLinear).
        autocast_adapter_dtype: keep adapters of float16 and bfloat16 layers in float32.

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
        merged_eval: bool = True,
        save: Kind = "adapter",
        verify: bool = False,
        seed: int | None = None,
        merge_after_fit: bool = False,
        quantize: str | None = None,
        dequantize: str | torch.dtype | None = None,
        lr_ratio: float | None = None,
        verbose: bool = True,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        target_parameters: Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        modules_to_save: Sequence[str] | None = None,
        trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        task_type: Task | None = None,
        ensure_weight_tying: bool = True,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        bias: Bias = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        variant: str = PLAIN,
        variant_options: Mapping[str, Any] | None = None,
        init_lora_weights: bool | Init | str = True,
        enable_lora: Mapping[str, Sequence[bool]] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        self.config = _one_config(config, locals(), self.given)
        self.given |= {field.name for field in fields(LoRAConfig)} if config else set()
        self.merged_eval = merged_eval
        self.save = save
        self.verify = verify
        self.seed = seed
        self.merge_after_fit = merge_after_fit
        self.quantize = quantize
        self.dequantize = dequantize
        self.lr_ratio = lr_ratio
        self.verbose = verbose
        check_own_options(self)
        self._states: ByModule[FitState] = ByModule()

    def __repr__(self) -> str:
        parameters = inspect.signature(LoRACallback).parameters
        own = {name: p.default for name, p in parameters.items() if name not in ("config", *vars(self.config))}
        given = {name: getattr(self.config, name) for name in self.config.differing(LoRAConfig())}
        given |= {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # --- in the order in which Lightning calls them ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt layers before the optimizer is built and the strategy wraps; patch the methods that build others."""
        prepare_strategy(trainer.strategy)
        handle = set_up(trainer, pl_module, self, stage)
        if handle is not None:
            adapt_late_layers(handle)
        self._state(pl_module).evaluation.verified = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the adapter can be trained, record the base's fingerprint, show what is trained, log options."""
        state = self._state(pl_module)
        state.begin_fit()
        handle = open_for_fit(pl_module)
        check_fit(trainer, handle, self)
        record_fit(trainer, handle, self, state.logged)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from data where the options say so; explain Lightning's warning of modules in eval mode."""
        self._state(pl_module).logged.remove(pl_module)
        start_training(trainer, pl_module, self)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget which layers are in eval mode; the first batch lists them anew, when every mode is training's."""
        self._state(pl_module).forget_lists()
        refuse_replaced_layers(Listing(pl_module), "LoRACallback")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the strategy's setup, or a hook, has not replaced adapted layers; let the bar say "merged"."""
        self._state(pl_module).evaluation.start(trainer, pl_module, self.merged_eval)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Unmerge what is merged, and let dropout act in layers that Lightning keeps in eval mode."""
        self._state(pl_module).start_batch(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the initial value of every base parameter that became trainable since the last step."""
        self._state(pl_module).lists(pl_module).record_trainable(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Let dropout follow each layer's own mode; after an optimizer's first step, warn of what it did not train."""
        self._state(pl_module).end_batch(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Merge at the first batch, because weight averaging swaps weights after the start hooks; begin verify."""
        options = {"merged_eval": self.merged_eval, "verify": self.verify}
        self._state(pl_module).start_evaluation_batch(trainer, pl_module, **options)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log and warn of what verify saw in the first batch."""
        self._state(pl_module).evaluation.end_batch(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unmerge, before weight averaging swaps weights back."""
        self._state(pl_module).evaluation.end_epoch(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Patch the module's own hook where setup did not run: in the main process of a launcher."""
        save_as_where_unpatched(pl_module, self.save, self.dequantize)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit came to its end."""
        self._state(pl_module).end_fit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unmerge after an exception or Ctrl-C, which skips the epoch's end and teardown."""
        self._state(pl_module).break_off(trainer, pl_module, exception)
        self._states.pop(pl_module, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unmerge what is merged still; in a process that ends with the fit, hand the record to the main process.

        A merge for good comes last, when every checkpoint of the fit is written and averaged weights are in place.
        """
        state = self._state(pl_module)
        state.leave(pl_module)
        stop_adapting(pl_module)
        has_ended = False
        if stage == "fit":
            export_where_launched(trainer, pl_module)
            has_ended = state.close_fit()
        if not state.running:  # else a fit goes on, of which a hook ran this Trainer
            self._states.pop(pl_module, None)
        if has_ended and self.merge_after_fit:
            merge_for_good(pl_module)

    def on_after_setup(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be in Fabric's list: Fabric calls this hook, and none of a Trainer's."""
        refuse_callback(self.config)

    on_after_optimizer_step = on_after_setup  # which Fabric calls where the model came from setup_module

    def _state(self, pl_module: LightningModule) -> FitState:
        """Return the state of a module; a new one if setup did not run, or an exception ended the run."""
        state = self._states.get(pl_module)
        if state is None:
            state = self._states[pl_module] = FitState()
        return state


def _one_config(
    configs: Sequence[LoRAConfig | PeftConfig], arguments: Mapping[str, Any], given: Collection[str]
) -> LoRAConfig:
    """Return the config that was given, whole or option by option, never both. `given` names the single options."""
    options = {field.name: arguments[field.name] for field in fields(LoRAConfig)}
    from_options = LoRAConfig(**options)
    if not configs:
        return from_options
    if len(configs) > 1 or not is_config(configs[0]):
        types = ", ".join(type(config).__name__ for config in configs)
        raise LoRAError(f"LoRACallback: expected one LoRAConfig or options by their names, found {types}.")
    beside = [name for name in options if name in given]
    if beside:
        raise LoRAError(f"LoRACallback: {', '.join(beside)} given beside a LoRAConfig; say it in the LoRAConfig.")
    return as_config(configs[0])


become_callback(LoRACallback)
