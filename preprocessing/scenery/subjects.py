"""The procedural subjects by name."""

from collections.abc import Callable

import numpy as np

from preprocessing.scenery.foliage import plan_garden
from preprocessing.scenery.library import plan_library
from preprocessing.scenery.painter import Box, Plan

SUBJECTS: dict[str, Callable[[Plan, np.random.Generator, Box, float], None]] = {
    "library": plan_library,
    "garden": plan_garden,
}
