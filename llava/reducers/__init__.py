"""Visual-token reduction: pure tensor code between a vision tower and the projector. docs/reducers.md."""

from llava.reducers import baselines as baselines
from llava.reducers import prumerge as prumerge
from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.registry import (
    Reducer,
    ReducerInputError,
    ReducerSpecError,
    available_reducers,
    build_reducer,
    option,
    register,
)

__all__ = [
    "ReducedTokens",
    "Reducer",
    "ReducerInputError",
    "ReducerSpecError",
    "VisionFeatures",
    "available_reducers",
    "build_reducer",
    "option",
    "register",
]
