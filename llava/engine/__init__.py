"""The inference engine: requests in, answers out, batched (`answer`) or as a stream of text (`stream`).

Evaluation, chat, the demo, the quickstart and LLaVA's scripts all ask a model through an `Engine`: a
`LocalEngine`, or an `EndpointEngine`, which asks a server. What one call of `LocalEngine.answer` does, chunk
by chunk of some dozens of images with all their questions:

1. Each distinct image is decoded (in worker processes, ahead of time), encoded and reduced once, or once for
   each question where the reducer reads it.
2. The beginning that all prompts share (the system prompt) goes through the language model once, and each
   distinct opening after it (up to and with the last image) once. The keys and values are kept
   (llava/model/prefix.py), so a question costs its own words only.
3. Questions of similar length are answered together, as many as fit a budget of tokens. Where memory runs out
   the budget is halved and what is left is planned anew.

None of this changes an answer: attention is causal, padding is masked, positions count from each prompt's own
start, and in float32 the answers are those of asking one question at a time (tested).
"""

from llava.engine.endpoint import EndpointEngine
from llava.engine.local import LocalEngine, Look, check_template
from llava.engine.requests import Answer, Engine, Request, Timing, finish, key_of
from llava.engine.source import ModelSource

__all__ = [
    "Answer",
    "EndpointEngine",
    "Engine",
    "LocalEngine",
    "Look",
    "ModelSource",
    "Request",
    "Timing",
    "check_template",
    "finish",
    "key_of",
]
