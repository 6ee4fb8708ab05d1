"""LLaVA's script of this name, on `llava.eval.convert`; `llava submit` is its successor."""

from llava.eval.convert import gqa_for_eval, main

if __name__ == "__main__":
    main(gqa_for_eval)
