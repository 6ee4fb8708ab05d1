"""`python -m llava.eval.model_vqa_mmbench`: LLaVA's runner for MMBench, in English and Chinese."""

from llava.legacy import MODEL_VQA_MMBENCH, script

eval_model = MODEL_VQA_MMBENCH.eval_model

if __name__ == "__main__":
    script(MODEL_VQA_MMBENCH.main)
