"""LLaVA's script of this name; `llava submit` is its successor."""

from llava.legacy import mmbench_for_submission, script

if __name__ == "__main__":
    script(mmbench_for_submission)
