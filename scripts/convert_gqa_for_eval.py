"""LLaVA's script of this name, on `llava.eval.legacy_scoring`; `llava submit` is its successor."""

from llava.eval.legacy_scoring import gqa_for_eval, main

if __name__ == "__main__":
    main(gqa_for_eval)
