"""The procedural subjects by name.

Each is a function (drawing, rng, outer, unit): it adds the subject to `drawing` so that it fills the box `outer`. Sizes
are multiples of `unit`, 1/1536 of a 240 mm frame's width, in scene units.
"""

from collections.abc import Callable

import numpy as np

from preprocessing.simulator.scenery.canvas import Box
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.foliage import draw_garden
from preprocessing.simulator.scenery.library import draw_library
from preprocessing.simulator.scenery.posters import draw_posters
from preprocessing.simulator.scenery.street import draw_street

SUBJECTS: dict[str, Callable[[Drawing, np.random.Generator, Box, float], None]] = {
    "street": draw_street,
    "posters": draw_posters,
    "library": draw_library,
    "garden": draw_garden,
}
