"""LLaVA's script of this name; `llava score` is its successor."""

from llava.eval.legacy_scoring import eval_textvqa, main

if __name__ == "__main__":
    main(eval_textvqa)
