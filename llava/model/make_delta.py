"""`python -m llava.model.make_delta`, LLaVA's name for `llava tools make-delta`."""

import sys

from llava.cli import main

if __name__ == "__main__":
    sys.exit(main(["tools", "make-delta", *sys.argv[1:]]))
