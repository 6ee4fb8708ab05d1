"""`python -m llava.serve.cli`, LLaVA's name for `llava chat`."""

import sys

from llava.legacy import serve_cli as main

if __name__ == "__main__":
    sys.exit(main())
