"""`python -m llava.serve.cli`, LLaVA's name for `llava chat`: the same flags, its temperature of 0.2 and its
way to infer the template."""

import argparse
import sys
from collections.abc import Sequence

from llava.conversation import conv_mode_for
from llava.errors import exit_status
from llava.mm_utils import get_model_name_from_path
from llava.serve import chat


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llava.serve.cli", description=__doc__)
    chat.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(temperature=0.2)
    args = parser.parse_args(argv)
    args.conv_mode = args.conv_mode or conv_mode_for(get_model_name_from_path(args.model_path))
    return exit_status(lambda: chat.run(args), name="llava.serve.cli", debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
