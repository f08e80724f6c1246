"""Drawings: commands recorded once in scene units and rendered on every canvas of a plane.

The canvases are nested: a fine, small one in the centre, coarser and larger ones around it. Each is rendered at its
density; commands too small to be visible there are skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from preprocessing.simulator.scenery.canvas import Box, Canvas
from preprocessing.simulator.scenery.painter import Painter


@dataclass
class Drawing:
    """A list of drawing commands in scene units."""

    commands: list[tuple[Box, float, Callable[[Painter], None]]] = field(default_factory=list)

    def add(
        self, box: Box, command: Callable[..., None], /, *arguments: Any, smallest: float = 0.0, **named: Any
    ) -> None:
        """Record a call of `command(painter, *arguments, **named)`, for example of `Painter.rect`.

        box        bounds of the pixels it changes
        smallest   size of its detail in scene units; it is skipped on canvases where that is below 1 pixel
        """
        self.commands.append((box, smallest, partial(_call, command, arguments, named)))

    def render(self, canvas: Canvas, inner: Box | None) -> None:
        """Draw on a canvas. Commands wholly inside `inner` are skipped, since a finer canvas will replace that part."""
        painter = Painter(canvas)
        left, top, right, bottom = canvas.box
        for box, smallest, command in self.commands:
            if box[2] < left or box[0] > right or box[3] < top or box[1] > bottom:
                continue
            if smallest * canvas.density < 1.0 and smallest > 0:
                continue
            if inner and inner[0] < box[0] and box[2] < inner[2] and inner[1] < box[1] and box[3] < inner[3]:
                continue
            command(painter)


def _call(command: Callable[..., None], arguments: tuple[Any, ...], named: dict[str, Any], painter: Painter) -> None:
    command(painter, *arguments, **named)
