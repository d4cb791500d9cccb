"""Adapters out of models and into them: save, load, swap, attach, combine; merged weights out of models.

formats/ knows no model, and model/ knows no file. This folder knows both.

[Note: one save and one load, file by file]

What leaves a model is an Adapter (adapter/adapter.py): tensors by name, layers by name with kind, rank and scaling. It
is a value: it does not change with the model, and every format is written from it and read into it. Each line is a
function, in the order of the calls; an indented one is called by the one above it.

save_adapter(model, path):

    save_load.save_adapter                      the public function; it also writes an Adapter, without a model
        model/adapted_model.open_model          opens the model once; the rest takes the handle, and searches no more
        take.adapter_of_model                   copies the adapter out of the model
            model/live_state.open_state         lists the live tensors, and which of them training changes
            take.fingerprint_of                 what tells this base from another one, when the adapter is loaded
        save_load._write                        adds the frozen tensors that PEFT wants; one rank goes on from here
        formats/peft_folder.write_folder        writes the folder, from the Adapter alone
            formats/peft_folder.folder_content  the equal adapter in PEFT's form, and all that the files will hold:
                formats/peft_equivalents.to_peft_form
                                                what PEFT has in another form, such as enable_lora or PiSSA
                adapter/metadata.to_metadata    our own description, for the header of the tensor file
                formats/peft_options.options_to_peft
                                                the fields of adapter_config.json
                formats/peft_names.peft_name    PEFT's name of each tensor
            files/atomic.new_folder             the old files stay until the new ones are whole
            files/safetensors.write_tensors     the bytes

load_adapter(model, path), onto a model without an adapter:

    save_load.load_adapter                      the public function
        formats/sources.read_source             an Adapter from any source, by its form. It knows no model yet
            formats/peft_reading.read_folder    of a PEFT folder; the head of that file has each step of it
        model/adapted_model.find_adapted        the handle of a model that has an adapter
        apply.apply_adapter                     all or nothing: model/transaction.py takes it back after an error
            align.align_names                   the prefix at which the adapter's layers are modules of this model
            first_names.by_first_names          a shared module is adapted under its first name
            trained_with.check_attached         what it was trained with is attached here
            model/inject.inject_layers          puts in the layers that the tensors name; no option selects anything
            apply._fill_                        writes the values:
                align.split_off_base            what is this model's base; with a model one can tell
                align.add_frozen_weights        what this model saves, and the source does not hold
                fit_checks.check_adapter        layers, kinds, names, shapes: last, as all of the above changes names
                take.check_fingerprint          the base is that of the training, or a warning says so
                apply.copy_values               copies: nothing was written before, nothing is refused after

A model that has an adapter gets, in place of inject_layers, new ranks and scalings (fit_checks.specs_for), or other
layers where those differ (apply._replace_layers). It is unmerged meanwhile.

Other ways through the same parts:

    a Trainer's checkpoint      checkpoint_of_model.convert_checkpoint and prepare_for_load. They convert Lightning's
                                own state dict; formats/lightning_checkpoint.py has its layout
    attach                      attach.attach: read, align and check as above, then model/attached.py
    a full checkpoint's class   build_module.build_module lets Lightning build it, without the file's tensors
    combine, export             formats/sources.adapter_with_options reads; there is no model
    merged weights              merged_tensors.py in memory, merged_folder.py on disk; one tensor at a time
"""
