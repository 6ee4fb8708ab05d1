"""LLaVA's script of this name; `llava submit` is its successor."""

from llava.legacy import mmvet_for_eval, script

if __name__ == "__main__":
    script(mmvet_for_eval)
