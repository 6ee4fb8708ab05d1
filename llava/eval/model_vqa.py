"""`python -m llava.eval.model_vqa`: LLaVA's runner for LLaVA-Bench, MM-Vet and question files of your own."""

from llava.legacy import MODEL_VQA, script

eval_model = MODEL_VQA.eval_model

if __name__ == "__main__":
    script(MODEL_VQA.main)
