"""Adapters out of models and into them: save, load, take, swap, combine; merged weights out of models.

Formats know no model, and a model knows no file. This room knows both.
"""
