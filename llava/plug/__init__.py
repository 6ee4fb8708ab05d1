"""Token reducers inside transformers' own LLaVA classes, in one line. docs/plug.md.

reduce_tokens(model, "prumerge+(tokens=144)")
"""

from llava.plug.model import reduce_tokens, restore

__all__ = ["reduce_tokens", "restore"]
