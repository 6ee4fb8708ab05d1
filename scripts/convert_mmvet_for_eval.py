"""LLaVA's script of this name, on `llava.eval.legacy_scoring`; `llava submit` is its successor."""

from llava.eval.legacy_scoring import main, mmvet_for_eval

if __name__ == "__main__":
    main(mmvet_for_eval)
