"""Adapters out of models and into them: save, load, swap, attach, combine; merged weights out of models.

formats/ knows no model, and model/ knows no file. This folder knows both.

[Note: one save and one load, file by file]

What leaves a model is an Adapter (adapter/adapter.py): tensors by name, layers by name with kind, rank and scaling. It
is a value: it does not change with the model, and every format is written from it and read into it. Each line is a
function, in the order of the calls; an indented one is called by the one above it.

save_adapter(model, path):

    save_load.save_adapter                      the public function; it also writes an Adapter, without a model
        model/adapted_model.open_model          opens the model once; the rest takes this handle
        take.adapter_of_model                   copies the adapter out of the model
            model/live_state.open_state         lists the live tensors, and which of them training changes
            take.fingerprint_of                 what tells this base from another; a fit took it when it started
        save_load._write                        adds the frozen tensors that PEFT wants; one rank of a sharded model
                                                goes on from here
            formats/peft_folder.write_folder    writes the folder, from the Adapter alone
                formats/peft_folder.folder_content
                                                refuses what PEFT has no equal of; all that the files will hold:
                    formats/peft_equivalents.to_peft_form
                                                what PEFT has in another form, such as PiSSA
                    adapter/metadata.to_metadata
                                                our own description, for the header of the tensor file
                    formats/peft_options.options_to_peft
                                                the fields of adapter_config.json
                    formats/peft_names.peft_name
                                                PEFT's name of each tensor
                files/atomic.new_folder         the old files stay until the new ones are whole
                files/safetensors.write_tensors the tensors; the options and the card follow

load_adapter(model, path), onto a model without an adapter:

    save_load.load_adapter                      the public function
        formats/sources.read_source             an Adapter from any source, by its form. Of the model it knows
                                                only the order of parameters
            formats/peft_reading.read_folder    of a PEFT folder; the head of that file has each step of it
        model/adapted_model.find_adapted        the handle of a model that has an adapter
        apply.apply_adapter                     all or nothing: model/transaction.py takes it back after an error
            align.align_names                   the prefix at which the adapter's layers are modules of this model
            first_names.by_first_names          a shared module is adapted under its first name
            trained_with.check_attached         what it was trained with is attached here
            model/inject.inject_layers          puts in the layers that the tensors name; no option selects anything
            apply._check_and_copy_              writes the values:
                align.as_in_model               stacks of experts, by this model's kinds of layers
                align.split_off_base            what is this model's base; with a model one can tell
                align.split_off_foreign         what modules of other libraries write into state_dict()
                align.add_frozen_weights        what this model saves, and the source does not hold
                fit_checks.check_adapter        layers, kinds, names, shapes, after all that changes names
                take.check_fingerprint          the base is that of the training, or a warning says so
                apply.copy_values               copies. Layers are there, and no value was written before. It
                                                can still fail: merging may overflow, a module may refuse its state

A model that has an adapter gets, in place of inject_layers, new ranks and scalings (fit_checks.specs_for), or other
layers where those differ (apply._replace_layers). It is unmerged meanwhile. The head of apply.py lists what takes a
failed load back.

a Trainer's checkpoint:

    trainer/setup._prepare_ddp_and_checkpoints
                                                at the start of a fit: the run keeps `save`, two hooks are patched
    trainer/one_file._state_dict                gathers the state where ranks divide the model
        checkpoint_of_model.gathered_state      merges or leaves the base out before it gathers
    trainer/checkpoint_hooks._on_save_checkpoint
                                                Lightning has put state_dict() into the checkpoint before
        checkpoint_of_model.convert_checkpoint  by its kind, see formats/lightning_checkpoint.py
            take.adapter_in_state               the keys of LiveState: the one list of what training changes
    checkpoint_of_model.prepare_for_load        before load_state_dict: adds what the file leaves out

`lightning-lora merge`, without a model:

    command/merge.merge_on_disk
        command/merge.fit_to_base               the adapter under the base's names
        command/merge.plan_updates              what becomes of each tensor
        command/write_merged.write_folder_of    or write_file_of
            command/write_merged.result_tensor  one tensor. Check sums and range are checked here

Other ways through the same parts:

    attach                      attach.attach: read, align and check as above, then model/attached.py
    a full checkpoint's class   build_module.build_module lets Lightning build it, without the file's tensors
    combine, export             formats/sources.adapter_with_options reads; there is no model
    merged weights              merged_tensors.py in memory, merged_folder.py on disk; one tensor at a time
"""
