"""`python -m llava.eval.run_llava`, and `eval_model(args)`: one question about one or more pictures."""

import sys

from llava.legacy import run_llava as eval_model
from llava.legacy import run_llava_main

__all__ = ["eval_model"]

if __name__ == "__main__":
    sys.exit(run_llava_main())
