"""LLaVA's script of this name; `llava score` is its successor."""

from llava.eval.legacy_scoring import eval_science_qa, main

if __name__ == "__main__":
    main(eval_science_qa)
