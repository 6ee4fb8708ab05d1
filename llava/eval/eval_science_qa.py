"""LLaVA's script of this name; `llava score` is its successor."""

from llava.legacy import eval_science_qa, script

if __name__ == "__main__":
    script(eval_science_qa)
