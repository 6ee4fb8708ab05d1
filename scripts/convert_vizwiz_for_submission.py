"""LLaVA's script of this name; `llava submit` is its successor."""

from llava.legacy import script, vizwiz_for_submission

if __name__ == "__main__":
    script(vizwiz_for_submission)
