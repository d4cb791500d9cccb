"""What an adapter looks like in files: PEFT folders, checkpoints of Lightning, loralib's files.

A reader turns files into an Adapter, a writer turns an Adapter into files. Nothing here knows a model: what only a
model tells is asked in exchange/ (align.py), which also builds modules from checkpoints (build_module.py). sources.py
recognises the form of a source; peft_reading.py and peft_folder.py have the steps of reading and writing for PEFT.
"""
