"""`python -m llava.eval.run_llava`, and `eval_model(args)`: one question about one or more pictures."""

from llava.legacy import run_llava as eval_model
from llava.legacy import run_llava_parser, script

if __name__ == "__main__":
    script(lambda: eval_model(run_llava_parser().parse_args()))
