"""`python -m llava.model.apply_delta`, LLaVA's name for `llava tools apply-delta`."""

import sys

from llava.cli import main

if __name__ == "__main__":
    sys.exit(main(["tools", "apply-delta", *sys.argv[1:]]))
