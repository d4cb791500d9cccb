"""A whole model: put adapters in, take them out, merge them, and view the state. No files, no Trainer.

[Note: the state of an adapted model]

A model keeps its own modules, parameters and names. What this package adds lies in five kinds of objects. "kept" says
what a deepcopy or a pickle of the model has of a field; "new" that the copy has the field's default.

Injection, in injection.py: one for each injected model. inject, load_adapter and attach make it, and so does unload
where adapters stay attached. Injection.begin puts it into the injected module (attribute lora_injection), each
LayerState and each ModuleFacts hold it too. Injection.end takes it out. With a loaded adapter that has no place in the
layers a new one begins (inject.replace_layers).

    config              kept    the options
    seed                kept    what adapters are drawn from
    chosen              kept    what a loaded adapter adapts and trains
    layers              kept    names of the adapted layers, written by attached.record_and_patch_layers
    trained_count       kept    raised by AdaptedModel.record_as_trained, set back by take_back_facts_
    facts               new     of tensors; a copy's are in its modules
    origin              kept    what a loaded file says of its base
    marks               kept    see below
    attached            kept    strength and fingerprint by name; changed by attach, detach and set_strength
    run                 kept    a Run of trainer/, which only trainer/ writes
    fits                new     fits under way, written by callback.py and trainer/
    in_training_batch   new     dropout acts in eval mode too, written by trainer/
    merged_to_evaluate  new     the end of an evaluation unmerges, written by trainer/
    root                new     a weak reference to the injected module
    claims              new     the open claims: one writer at a time, see nn/claims.py
    strength_log        new     strengths that open blocks have set

Its marks: validated, merged, merges by mode, started, quantized, trained, ended, attached alone, factored. What each
means stands beside their definition.

The attribute lora_active of each adapted layer or parameter decides its forward. True: the adapters act, and the
forward adds the factors' product or runs on W'. False: the base class's own forward runs. A copy keeps it. merge_ and
unmerge_ write it; disable_adapter and a start from gradients write it for their time.

What "merged" means: a layer with merged True, undo set and lora_active False holds W' in its weight. One with merged
True and undo None stays factored (a tied or quantized weight). The mark "merged" of the injection is a cheap answer for
hooks: False, no layer is merged; True, look at the layers.

LayerState, in nn/adapted_weights.py: `layer.lora` of each adapted layer or parameter. nn/layer_kinds.adapt_ and its
like make it. create_ then adds the factors, which are parameters of the module. unadapt_ ends both, with the module's
class.

    spec                kept    rank, scaling, variant
    name                kept    in the injected module
    injection           kept    the copy's own, one for all of its layers
    custom_forward      kept    its forward runs on W'
    merged              kept    merge was called; False again with unmerge
    undo                kept    restores W while W' is in the weight
    unfinished          kept    a merge or restore was broken off, and the next call completes it
    stands_in           kept    forwards with W' in the weight's place
    why_not_merge       kept    such as a tie, written by nn/tied_weights.record_ties
    restore_failed      kept    the weight may differ from W, and is not saved
    rounding_reported   kept    a message was logged
    sharded             kept    dimensions of ranks
    training_checked    kept    of a warning
    in_segment          kept    of reentrant checkpointing
    strength            new     another one inside of `scaled`; where nothing is trained it is 0
    attached            kept    factors of the attached adapters, a Packed; see nn/attached_factors.py
    known_info          new     a cache
    copies              new     memory of plain copies, kept from merge to merge
    lock                new     held while W' stands in or the weight is written

ModuleFacts, in facts.py: attribute lora_facts of each module that holds something. begin_facts makes it, end_facts
removes it.

    injection           kept    the copy's own
    tensors             kept    a Fact by name in the module
    adapted_children    kept    which children hold adapted layers, to see that one was replaced
    left_out            kept    why "all-linear" leaves the layer out
    is_scope            kept    a loaded adapter is for this part

Fact, in facts.py: of one base parameter or persistent buffer. AdaptedModel.fact makes it.

    requires_grad       kept    before injection, which strip_adapters brings back
    trained             kept    why it is trained
    initial             kept    its value from before training, which unload brings back
    entry               kept    of the fingerprint, from fit start
    memory              new     where the tensor lies

Undo, in nn/exact_merge.py: made by merge_, ended by unmerge_.

    scaling             kept    s
    merged_checksum     kept    of W'
    base_checksum       kept    of W
    chunks              kept    what restores each block of W
    edited              kept    something changed W' meanwhile
    lost                kept    W did not come back

Listing and AdaptedModel, in adapted_model.py, are no state: a call makes one, which finds all of the above by a walk,
and drops it at its end.

Where the state goes. A fact is found by its tensor's memory; where a cast or a strategy has replaced the tensor, by its
name in its module. So a wrapper, a moved, renamed or re-ordered module keep all, a new module has nothing. A cast or a
move of a merged layer unmerges it meanwhile. A cast to 16 bits leaves factors in the dtype they have, unless
autocast_adapter_dtype=False. A live slice, such as model[:2], shares the layers: merge, unmerge and is_merged act on
its part, and calls for the whole adapter (take_adapter, unload, disable_adapter) are refused there. A deepcopy of the
slice is a model by itself.

Beside these, modules hold patches: methods replaced by patches.patch (train, save_pretrained, checkpointing), hooks of
load_state_dict and of reentrant checkpointing, lora_reads of readers, switches of fast paths, and flags of 4-bit
layers. record_and_patch_layers puts most of them in, and unload takes all out.

What a small checkpoint holds: LiveState.changing, in live_state.py.

Blocks. `merged` holds its claim, and notes whether the model was merged. `scaled` and `disable_adapter` also hold the
strengths that a block around them has set, and the initial values of what was fully trained. disable_adapter also holds
which layers were active. merging.run_block restores what was found. nn/claims.REFUSED says which calls are refused
inside of which block.
"""
