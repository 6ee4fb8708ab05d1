"""LLaVA's script of this name, on `llava.eval.convert`; `llava submit` is its successor."""

from llava.eval.convert import main, mmvet_for_eval

if __name__ == "__main__":
    main(mmvet_for_eval)
