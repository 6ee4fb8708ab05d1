"""`python -m llava.eval.model_vqa_science`: LLaVA's runner for ScienceQA."""

from llava.legacy import MODEL_VQA_SCIENCE, script

eval_model = MODEL_VQA_SCIENCE.eval_model

if __name__ == "__main__":
    script(MODEL_VQA_SCIENCE.main)
