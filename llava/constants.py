"""Numbers and strings the LLaVA ecosystem agrees on. The released weights were trained with them."""

IGNORE_INDEX = -100
"""Label of a position that takes no part in the loss."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id in `input_ids`; one stands for all visual tokens of one image."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
"""What a user writes in a query to say where an image goes."""
