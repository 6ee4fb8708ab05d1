"""`python scripts/extract_mm_projector.py`, LLaVA's name for `llava tools extract-projector`."""

import sys

from llava.cli import main

if __name__ == "__main__":
    sys.exit(main(["tools", "extract-projector", *sys.argv[1:]]))
