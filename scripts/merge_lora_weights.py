"""`python scripts/merge_lora_weights.py`, LLaVA's name for `llava tools merge-lora`."""

import sys

from llava.cli import main

if __name__ == "__main__":
    sys.exit(main(["tools", "merge-lora", *sys.argv[1:]]))
