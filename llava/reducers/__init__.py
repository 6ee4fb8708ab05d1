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

# Rivals: each file registers its method.
from llava.reducers import cdpruner as cdpruner
from llava.reducers import divprune as divprune
from llava.reducers import evit as evit
from llava.reducers import hiprune as hiprune
from llava.reducers import holov as holov
from llava.reducers import mmtok as mmtok
from llava.reducers import scope as scope
from llava.reducers import tome as tome
from llava.reducers import visionzip as visionzip
from llava.reducers import vispruner as vispruner
