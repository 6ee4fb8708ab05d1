"""`python -m llava.eval.model_vqa_mmbench`: LLaVA's runner for MMBench, in English and Chinese."""

import sys

from llava.legacy import MODEL_VQA_MMBENCH

eval_model = MODEL_VQA_MMBENCH.eval_model

if __name__ == "__main__":
    sys.exit(MODEL_VQA_MMBENCH.main())
