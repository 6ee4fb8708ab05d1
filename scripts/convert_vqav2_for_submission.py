"""LLaVA's script of this name; `llava submit` is its successor."""

from llava.legacy import script, vqav2_for_submission

if __name__ == "__main__":
    script(vqav2_for_submission)
