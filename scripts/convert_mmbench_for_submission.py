"""LLaVA's script of this name, on `llava.eval.legacy_scoring`; `llava submit` is its successor."""

from llava.eval.legacy_scoring import main, mmbench_for_submission

if __name__ == "__main__":
    main(mmbench_for_submission)
