"""`python -m llava.eval.model_vqa_loader`: LLaVA's runner for VQAv2, GQA, VizWiz, TextVQA, POPE, ..."""

from llava.legacy import MODEL_VQA_LOADER, script

eval_model = MODEL_VQA_LOADER.eval_model

if __name__ == "__main__":
    script(MODEL_VQA_LOADER.main)
