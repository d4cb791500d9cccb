"""LoRACallback, which calls the functions of this package at the right moments of a Trainer's life."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from .adapter.fingerprint import fingerprint
from .adapter.lightning_checkpoint import Kind, check_kind
from .arguments import names_near_misses
from .config import LEAVE_OUT, PLAIN, Bias, Init, LoRAConfig, PeftConfig, Task, as_config, is_config
from .errors import LoRAError, NonFiniteError, sentence
from .model.dequantize import dequantize_dtype
from .model.gradients import explain_missing_gradients, warn_of_untrained
from .model.inject import begin_injection, fixed_seed, random_seed
from .model.injection import find_injection, refuse_replaced_layers, snapshot_materialised
from .model.large_adapters import warn_of_large_adapters
from .model.merging import is_merged, merge, unmerge
from .model.param_groups import check_ratio
from .model.passed_over import warn_of_passed_over
from .model.patches import unpatch
from .model.pretrained import warn_of_new_heads
from .model.self_check import Verification, watch
from .model.state_dict import refuse_unmergeable
from .model.summary import summary
from .names import ALL_LINEAR
from .nn.gradient_checkpointing import enable_input_require_grads
from .notices import show, tell
from .plot.pictures import require_matplotlib
from .trainer.after_fit import (
    Fits,
    forget_merging,
    is_merged_for_good,
    load_plain_weights_only,
    merge_for_good,
    refuse_merge_after_fit,
)
from .trainer.bar_description import describe_as_merged, when_merged
from .trainer.checkpoint_hooks import export_state, save_as
from .trainer.cli_optimizer import adapt_cli_optimizer
from .trainer.compatibility import (
    launches,
    refuse_composition,
    refuse_other_options,
    refuse_unoptimized,
    warn_of_frozen,
    warn_of_idle_optimizers,
    warn_of_part,
)
from .trainer.eval_mode import explain_eval_mode, warn_of_checkpointing_off
from .trainer.hyperparameters import LoggedOptions, as_hyperparameters
from .trainer.late_layers import BUILDERS, adapt_after, stop_adapting
from .trainer.lightning_packages import first_package, for_each_package, is_overridden
from .trainer.log_plots import log_plots, tell_of_no_logger
from .trainer.precision import (
    convert_linear_layers_,
    leave_out_of_ddp_,
    refuse_for_quantised,
    refuse_late_conversion,
    refuse_unloadable,
)
from .trainer.start_batches import start_from_data
from .trainer.statistics import StatisticsLog
from .trainer.step_lists import StepLists
from .trainer.strategies import prepare_strategy

KEYWORD = inspect.Parameter.KEYWORD_ONLY
Method = TypeVar("Method", bound=Callable[..., None])

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = first_package().Callback


def _noting_options(init: Method) -> Method:
    """Let __init__ note which options were given: a default says nothing, and the same value given says something.

    A command line (LightningCLI) gives every option, those at their defaults too; then the others count as given.
    """
    defaults = {name: each.default for name, each in inspect.signature(init).parameters.items() if each.kind is KEYWORD}

    @functools.wraps(init)
    def noting(self: LoRACallback, *config: LoRAConfig | PeftConfig, **options: Any) -> None:
        filled_in = options.keys() >= defaults.keys()
        self._given = frozenset(o for o in options if not filled_in or options[o] != defaults.get(o))
        init(self, *config, **options)

    return cast(Method, noting)


@names_near_misses("LoRACallback", {**LEAVE_OUT, "config": "give it by position: LoRACallback(LoRAConfig(...))"})
class LoRACallback(Callback):
    """Adapt any LightningModule with LoRA: inject on setup, merge while evaluating, save small checkpoints.

    The options after `verbose` are LoRAConfig's. What of them is given must be what a model that the user injected was
    injected with, and what is left out is taken from it. A LoRAConfig gives all. In LightningCLI's configs, where
    defaults are filled in, only what differs from its default is given.

    Args:
        config: at most one: a LoRAConfig instead of its options one by one, or a peft.LoraConfig.
        merged_eval: merge for validation, test and prediction, and unmerge after.
        save: what a checkpoint holds: "adapter" (what training changes), "merged" (plain weights for programs without
            this package, and the adapter beside them) or "full" (base and adapter).
        verify: on the first evaluation batch, compare each layer's merged and factored output, log the error, and
            warn of layers that never ran or whose adapter had no effect.
        seed: what the adapters are drawn from; without one, the state of torch's random stream at setup, which is not
            advanced. Members of an ensemble need seeds of their own, or streams that differ.
        merge_after_fit: leave plain layers with merged weights behind when fit ends, for what saves the model itself,
            as save_pretrained or a library does. It is then evaluated as it is; of checkpoints it loads merged ones.
        dequantize: the dtype ("bfloat16", "float16", "float32") of plain weights in place of quantised ones, for
            save="merged" and merge_after_fit.
        log_plots: when fit ends, add pictures of the adapter to TensorBoard: norms of its updates and their singular
            values, see plot_adapter. Needs the extra `plot`.
        log_stats: at every so many optimizer steps, log statistics of the adapter by groups of layers: norm, effective
            rank, gradients, cosine to the last ones, and what merging takes; 0 logs none. See adapter_stats.
        lr_ratio: LoRA+ (arXiv:2402.12354), of the learning rate of B to that of A, as 16, for an optimizer that
            LightningCLI makes (--optimizer). In configure_optimizers of your own, call lora_param_groups.
        verbose: at fit start, show the summary, and explain Lightning's warning of modules in eval mode. Warnings of
            this package's own do not depend on it.
        r: rank of A (r, in) and B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r.
        lora_dropout: probability of dropping an input feature of the adapter while the layer is in training mode; a
            layer kept in eval mode drops too, in training batches where gradients are recorded.
        target_modules: the layers to adapt: a list of names or dotted suffixes, a regular expression, or "all-linear".
        target_parameters: parameters to adapt by themselves, as a recurrent layer's or a stack of experts; see
            LoRAConfig.
        exclude_modules: layers to leave alone although target_modules selects them.
        layers_to_transform: the number or numbers of the layers (blocks) in which target_modules, then a list, selects
            modules by a dotted suffix; see LoRAConfig.
        layers_pattern: the segment or segments of names (regular expressions) that such a number follows, as "layers".
        modules_to_save: modules that are trained and saved whole, beside the adapter.
        trainable_token_indices: rows of embeddings or output heads to train, such as those of new tokens: a list for
            the input embeddings, or one for each name or dotted suffix.
        task_type: "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" adds the head that such a model has in transformers to
            modules_to_save; see LoRAConfig.
        ensure_weight_tying: a weight that a module of modules_to_save shares with another stays one weight, trained for
            both; false refuses such a module.
        rank_pattern: another r for some layers; keys are regular expressions over a dotted suffix of the name.
        alpha_pattern: another lora_alpha for some layers, keys as in rank_pattern.
        bias: which biases are trained: "none", "all", or those of adapted layers ("lora_only").
        use_rslora: s = lora_alpha / sqrt(r).
        use_dora: DoRA, which scales each output's weights W + s * B @ A to a trained magnitude.
        variant: what an adapter stores and adds: "lora", "dora" (as use_dora), or a variant whose file was imported.
        init_lora_weights: true, false, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva" or
            "lora_ga"; see LoRAConfig.
        enable_lora: for a fused projection, which of its equal parts are adapted.
        autocast_adapter_dtype: keep adapters of float16 and bfloat16 layers in float32.

    Raises:
        LoRAError: a value is not allowed; the message holds it.
    """

    _given: frozenset[str]  # the options that were given

    @_noting_options
    def __init__(
        self,
        *config: LoRAConfig | PeftConfig,
        merged_eval: bool = True,
        save: Kind = "adapter",
        verify: bool = False,
        seed: int | None = None,
        merge_after_fit: bool = False,
        dequantize: str | torch.dtype | None = None,
        log_plots: bool = False,
        log_stats: int = 0,
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
        init_lora_weights: bool | Init | str = True,
        enable_lora: Mapping[str, Sequence[bool]] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        options = dict(locals())
        check_kind(save)
        dequantize_dtype(dequantize, "LoRACallback")
        for name in ("merged_eval", "verify", "merge_after_fit", "log_plots", "verbose"):
            if not isinstance(options[name], bool):
                raise LoRAError(f"LoRACallback: {name} must be true or false, but it is {options[name]!r}.")
        if not isinstance(log_stats, int) or isinstance(log_stats, bool) or log_stats < 0:
            raise LoRAError(f"LoRACallback: log_stats must be a whole number from 0, but it is {log_stats!r}.")
        if lr_ratio is not None:
            check_ratio(lr_ratio, "LoRACallback")
        adapter_options = {field.name: options[field.name] for field in fields(LoRAConfig)}
        self.config = _one_config(config, adapter_options, self._given)
        self._given |= adapter_options.keys() if config else set()
        self.merged_eval = merged_eval
        self.save = save
        self.verify = verify
        self.seed = seed
        self.merge_after_fit = merge_after_fit
        self.dequantize = dequantize
        self.log_plots = log_plots
        self.log_stats = log_stats
        self.lr_ratio = lr_ratio
        self.verbose = verbose
        if log_plots:
            require_matplotlib("LoRACallback(log_plots=True)")
        self._seed = "" if seed is None else fixed_seed(seed, "LoRACallback")
        # By module, because a hook may run a second Trainer with this callback.
        self._merged: set[nn.Module] = set()
        self._unmergeable: set[nn.Module] = set()  # in this evaluation
        self._lists: dict[nn.Module, StepLists] = {}
        self._verifying: tuple[AbstractContextManager[Verification], Verification] | None = None
        self._verified = False
        self._fits = Fits()
        self._logged = LoggedOptions()
        self._statistics = StatisticsLog(log_stats)

    def __repr__(self) -> str:
        parameters = inspect.signature(LoRACallback).parameters
        own = {name: p.default for name, p in parameters.items() if name not in ("config", *vars(self.config))}
        given = {name: getattr(self.config, name) for name in self.config.differing(LoRAConfig())}
        given |= {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # --- in the order in which Lightning calls them ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt what exists before the optimizer is built and the strategy wraps; the rest after configure_model."""
        prepare_strategy(trainer.strategy)
        injected = find_injection(pl_module)
        refuse_composition(trainer, self, injected=injected is not None)
        if is_merged_for_good(pl_module):
            if injected is None and stage != "fit":
                load_plain_weights_only(pl_module)
                return
            forget_merging(pl_module)
        if injected is None:
            convert_linear_layers_(pl_module)
            seed = self._seed or trainer.strategy.broadcast(random_seed())
            begin_injection(pl_module, self.config, seed=seed, given=self._given)
        else:
            refuse_late_conversion(pl_module)
            refuse_other_options(injected.record, self.config, self._given, self._seed)
            warn_of_part(trainer, injected.prefix.removesuffix("."))
        adapt_after(pl_module, *(name for name in BUILDERS if is_overridden(name, pl_module)))
        adapt_cli_optimizer(pl_module, self.lr_ratio, is_fit=stage == "fit")
        refuse_for_quantised(pl_module, trainer)
        leave_out_of_ddp_(pl_module)
        save_as(pl_module, self.save, self.dequantize)
        self._verified = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the adapter can be trained, record the base's fingerprint, show what is trained, log options."""
        refuse_replaced_layers(pl_module, "LoRACallback")
        snapshot_materialised(pl_module)
        refuse_unoptimized(trainer.optimizers, pl_module)
        warn_of_frozen(pl_module)
        warn_of_idle_optimizers(trainer.optimizers, pl_module)
        warn_of_new_heads(pl_module)
        warn_of_large_adapters(pl_module)
        injected = find_injection(pl_module)
        if injected is not None:
            warn_of_passed_over(injected.record)
        self._fits.begin(pl_module)
        enable_input_require_grads(pl_module)
        refuse_for_quantised(pl_module, trainer)
        if self.save == "full":
            refuse_unloadable(pl_module)
        if self.save == "merged":
            refuse_unmergeable(pl_module, dequantize_dtype(self.dequantize, "LoRACallback"))
        if self.merge_after_fit:
            refuse_merge_after_fit(trainer, pl_module)
        if injected is not None and not injected.record.fingerprint:
            injected.record.fingerprint = fingerprint(pl_module)
        if injected is not None:
            injected.record.merged_eval = self.merged_eval
        if injected is not None and trainer.loggers:
            options = as_hyperparameters(injected.record.config, save=self.save, merged_eval=self.merged_eval)
            self._logged.add(pl_module, options)
        self._statistics.begin(trainer, pl_module)
        if self.log_plots and injected is not None:
            tell_of_no_logger(trainer)
        if self.verbose:
            show(summary(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from data where the options say so; explain Lightning's warning of modules in eval mode."""
        self._logged.remove(pl_module)
        start_from_data(trainer, pl_module, find_injection(pl_module))
        if self.verbose:
            explain_eval_mode(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget which layers are in eval mode; the first batch lists them anew, when every mode is training's."""
        self._lists.pop(pl_module, None)
        refuse_replaced_layers(pl_module, "LoRACallback")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the strategy's setup, or a hook, has not replaced adapted layers; let the bar say "merged"."""
        self._statistics.take_back(trainer)
        refuse_replaced_layers(pl_module, "LoRACallback")
        describe_as_merged(trainer, when_merged(pl_module) if self.merged_eval else "")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Unmerge what is merged, and let dropout act in layers that Lightning keeps in eval mode."""
        self._statistics.take_back(trainer)
        lists = self._step_lists(pl_module)
        if lists.is_merged():
            unmerge(pl_module)
            self._merged.discard(pl_module)
        lists.override_dropout(True)
        if not lists.trained_a_batch:
            warn_of_checkpointing_off(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the initial value of every base parameter that became trainable since the last step; log_stats."""
        self._step_lists(pl_module).record_trainable(optimizer)
        if self.log_stats:
            self._statistics.log(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Let dropout follow each layer's own mode again; after the first batch, warn of what it did not train."""
        lists = self._step_lists(pl_module)
        lists.override_dropout(None)
        if not lists.trained_a_batch:
            lists.trained_a_batch = True
            warn_of_untrained(pl_module, optimized=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Merge at the first batch, because weight averaging swaps weights after the start hooks; begin verify."""
        self._merge(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log and warn of what verify saw in the first batch."""
        self._report(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unmerge, before weight averaging swaps weights back."""
        self._unmerge(pl_module)
        describe_as_merged(trainer, "")

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Patch the module's own hook where setup did not run: in the main process of a launcher."""
        injected = find_injection(pl_module)
        if injected is not None and injected.record.save is None:
            save_as(pl_module, self.save, self.dequantize)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take back what was logged at the last step."""
        self._statistics.take_back(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit came to its end; draw the adapter."""
        self._fits.end(pl_module)
        if self.log_plots and find_injection(pl_module) is not None:
            log_plots(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unmerge after an exception or Ctrl-C, which skips the epoch's end and teardown."""
        explain_missing_gradients(exception, pl_module)
        self._leave(pl_module)
        describe_as_merged(trainer, "")
        self._statistics.end(pl_module)
        self._fits.forget(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unmerge what is merged still; in a process that ends with the fit, hand the record to the main process.

        A merge for good comes last, when every checkpoint of the fit is written and averaged weights are in place.
        """
        self._leave(pl_module)
        stop_adapting(pl_module)
        if stage == "fit":
            self._statistics.end(pl_module)
        if stage == "fit" and launches(trainer) and find_injection(pl_module) is not None:
            export_state(pl_module)
        if stage == "fit" and self._fits.close(pl_module) and self.merge_after_fit:
            merge_for_good(pl_module)

    # --- helpers ---

    def _merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module in self._unmergeable or is_merged_for_good(pl_module):
            return
        if self.merged_eval and not self._step_lists(pl_module).is_merged():
            self._merged.add(pl_module)  # first, because Ctrl-C is raised when merging is complete
            try:
                with self._statistics.watch_merge(pl_module):
                    merge(pl_module)
            except NonFiniteError as error:
                if trainer.state.fn != "fit":
                    raise
                self._unmergeable.add(pl_module)  # EarlyStopping and others judge the loss
                describe_as_merged(trainer, "")
                rank_zero_warn(f"LoRACallback: this validation runs unmerged: {sentence(error)}")
                return
        if self.verify and not self._verified and self._verifying is None and not trainer.sanity_checking:
            watching = watch(pl_module)
            self._verifying, self._verified = (watching, watching.__enter__()), True

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._verifying is None:
            return
        (watching, verification), self._verifying = self._verifying, None
        watching.__exit__(None, None, None)
        errors = {f"lora_merge_error_{name}": value for name, value in verification.error.compute().items()}
        if not trainer.predicting:  # Lightning logs nothing there
            values = {name: value.float() for name, value in errors.items()}  # reduced, so that sync_dist keeps them
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)
        tell(f"LoRACallback: verified, {', '.join(f'{name} {value:.3g}' for name, value in errors.items())}")
        problems = verification.problems()
        if problems:
            rank_zero_warn(f"LoRACallback: {problems}. Is the forward another than the one you adapted?")

    def _unmerge(self, pl_module: LightningModule) -> None:
        if self._verifying is not None:  # the batch was broken off, perhaps on this rank alone: nothing is gathered
            (watching, _), self._verifying = self._verifying, None
            watching.__exit__(GeneratorExit, GeneratorExit(), None)
        self._unmergeable.discard(pl_module)
        if pl_module in self._merged:
            self._merged.discard(pl_module)
            if is_merged(pl_module):
                unmerge(pl_module)

    def _leave(self, pl_module: LightningModule) -> None:
        if pl_module in self._lists:
            self._step_lists(pl_module).override_dropout(None)
            del self._lists[pl_module]
        self._unmerge(pl_module)
        self._logged.remove(pl_module)
        if is_merged_for_good(pl_module):
            unpatch(pl_module)

    def _step_lists(self, pl_module: LightningModule) -> StepLists:
        lists = self._lists.get(pl_module)
        if lists is None or not lists.is_current():
            lists = self._lists[pl_module] = StepLists(pl_module)
        return lists


def _one_config(
    configs: Sequence[LoRAConfig | PeftConfig], options: Mapping[str, Any], given: Collection[str]
) -> LoRAConfig:
    """Return the config that was given whole or option by option, never both; `given` names what was given by name."""
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


def _become_callback_of(package: ModuleType) -> None:
    """Make every LoRACallback an instance of a package's Callback, as its Trainer and its command line ask."""
    if not issubclass(LoRACallback, package.Callback):
        LoRACallback.__bases__ += (package.Callback,)


for_each_package(_become_callback_of)
