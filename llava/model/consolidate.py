"""`python -m llava.model.consolidate`, LLaVA's name for `llava tools consolidate`."""

import sys

from llava.cli import main

if __name__ == "__main__":
    sys.exit(main(["tools", "consolidate", *sys.argv[1:]]))
