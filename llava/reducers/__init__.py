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

# The rivals register themselves, after our own.
from llava.reducers import (  # noqa: E402
    cdpruner,
    divprune,
    evit,
    hiprune,
    holov,
    mmtok,
    scope,
    tome,
    vispruner,
    visionzip,
)
