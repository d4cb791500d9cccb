"""python -m lightning_lora: the lightning-lora command."""

import sys

from .command.main import main

if __name__ == "__main__":
    sys.exit(main())
