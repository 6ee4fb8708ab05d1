"""LLaVA's script of this name, on `llava.eval.convert`; `llava submit` is its successor."""

from llava.eval.convert import main, vizwiz_for_submission

if __name__ == "__main__":
    main(vizwiz_for_submission)
