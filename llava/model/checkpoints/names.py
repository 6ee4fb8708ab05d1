"""The names of weights: what every format calls them, and the one set of names we use (released LLaVA's).

model.embed_tokens.*  model.layers.*  model.norm.*  lm_head.*      the language model
model.mm_projector.*  model.image_newline                          the projector
model.vision_tower.*                                               the tower, named as in transformers 5
"""

import re

TOWER = "model.vision_tower."
PROJECTOR = "model.mm_projector."
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")

_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^module\.", ""),  # DDP
        (r"^base_model\.model\.", ""),  # PEFT's wrapper
        (r"^(?:model\.)+(?=model\.)", ""),
        # llava-hf: on disk (4.37 and today), then in transformers 5's memory
        (r"^(?:model\.)?language_model\.(?:model\.)?lm_head\.", "lm_head."),
        (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
        (r"^(?:model\.)?multi_modal_projector\.linear_1\.", PROJECTOR + "0."),
        (r"^(?:model\.)?multi_modal_projector\.linear_2\.", PROJECTOR + "2."),
        (r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", TOWER),
        (r"^model\.lm_head\.", "lm_head."),
        # saved without the head
        (r"^(?=(?:mm_projector|embed_tokens|layers|norm)\.|image_newline$)", "model."),
    )
]

_BUFFERS = re.compile(r"(?:rotary_emb\.inv_freq|position_ids)$")


def canonical_name(name: str) -> str | None:
    """The one name of a weight, whatever wrote it; None for tables that old versions saved and none needs.

    Knows released LLaVA, PEFT's prefixes, llava-hf as written by transformers 4.37 to 5 and as 5 names it in
    memory, with and without a leading `model.`.
    """
    if _BUFFERS.search(name):
        return None
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def llava_hf_name(name: str) -> str:
    """What llava-hf files call a weight with this canonical name; the inverse of `canonical_name`."""
    if name.startswith(PROJECTOR):
        layer, _, rest = name.removeprefix(PROJECTOR).partition(".")
        return f"multi_modal_projector.linear_{int(layer) // 2 + 1}.{rest}"
    if name.startswith(TOWER):
        return f"vision_tower.vision_model.{name.removeprefix(TOWER)}"
    return f"language_model.{name}"
