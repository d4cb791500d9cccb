"""What an adapter looks like in files: PEFT folders, checkpoints of Lightning, loralib's files, transformers' names.

A reader turns files into an Adapter, a writer turns an Adapter into files. Nothing here knows a model.
"""
