"""An adapter apart from any model, and how it comes and goes: checkpoints, PEFT folders, merged folders."""
