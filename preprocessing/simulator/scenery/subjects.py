"""The procedural subjects by name."""

from collections.abc import Callable

import numpy as np

from preprocessing.simulator.scenery.foliage import plan_garden
from preprocessing.simulator.scenery.library import plan_library
from preprocessing.simulator.scenery.painter import Box, Plan
from preprocessing.simulator.scenery.posters import plan_posters
from preprocessing.simulator.scenery.street import plan_street

SUBJECTS: dict[str, Callable[[Plan, np.random.Generator, Box, float], None]] = {
    "street": plan_street,
    "posters": plan_posters,
    "library": plan_library,
    "garden": plan_garden,
}
