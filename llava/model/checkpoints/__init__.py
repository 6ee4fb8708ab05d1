"""The only reader and writer of checkpoints on disk; what other packages import of it.

locate: where one is; inspect: what it is; names: what weights are called; read, write: the files;
llava_hf: the format of transformers' own LLaVA classes.
"""

# ruff: noqa: F401
from llava.files import write_json
from llava.model.checkpoints.inspect import (
    KINDS,
    CheckpointInfo,
    inspect_checkpoint,
    inspect_model,
    read_json,
)
from llava.model.checkpoints.llava_hf import hf_vocabulary, llava_config_dict, write_llava_hf, write_tower
from llava.model.checkpoints.locate import resolve_beside, resolve_directory
from llava.model.checkpoints.names import EMBEDDINGS, PROJECTOR, TOWER, canonical_name, llava_hf_name
from llava.model.checkpoints.read import (
    MAX_ADDED_TOKENS,
    Weights,
    check_weights,
    fit_vocabulary,
    read_adapter,
    read_model_weights,
    read_projector,
    read_tensors,
    read_weights,
)
from llava.model.checkpoints.write import (
    replacing,
    save_full,
    save_lora,
    save_projector,
    save_tokenizer,
    write_tensors,
)
