"""Words, lines and muted colours for books, signs and posters."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from preprocessing.simulator.scenery.canvas import Colour

T = TypeVar("T")

_NOUNS = [
    "River", "Garden", "Winter", "Atlas", "Harbour", "Lantern", "Orchard", "Compass", "Meadow", "Island", "Bridge",
    "Mirror", "Railway", "Lighthouse", "Quarry", "Forest", "Kitchen", "Museum", "Theatre", "Valley", "Mountain",
    "Clockmaker", "Voyage", "Letters", "Songs", "Birds", "Stones", "Rain", "Colours", "Machines", "Cities",
    "Rivers", "Shadows", "Weather", "Bread", "Salt", "Copper", "Paper", "Glass", "Silence", "Morning", "Evening",
    "Summer", "Autumn", "Market", "Station",
]  # fmt: skip
_ADJECTIVES = [
    "Old", "New", "Hidden", "Quiet", "Northern", "Southern", "Complete", "Little", "Great", "Lost", "Early", "Late",
    "Green", "Blue", "Golden", "Open", "Modern", "Common", "Practical", "Distant", "Red", "White", "Second", "Last",
    "First",
]  # fmt: skip
_NAMES = [
    "Hartmann", "Okafor", "Lindqvist", "Moreau", "Tanaka", "Silva", "Novak", "Reyes", "Whitfield", "Castellan",
    "Brandt", "Ito", "Marsh", "Kowalski", "Duarte", "Ellery", "Fontaine", "Greer", "Holm", "Ivers", "Jansen",
    "Keller", "Lowe", "Mbeki", "Nilsen", "Olsen", "Petrov", "Quill", "Rowan", "Sandoval", "Thorne", "Ueda",
]  # fmt: skip
_VERBS = [
    "opens", "closes", "follows", "carries", "remembers", "measures", "paints", "repairs", "gathers", "leaves",
    "crosses", "visits",
]  # fmt: skip
_TRADES = [
    "Bakery", "Bookshop", "Florist", "Tailor", "Pharmacy", "Grocer", "Stationer", "Hardware", "Coffee", "Antiques",
    "Barber", "Fishmonger", "Optician", "Records", "Bicycles", "Printmaker", "Delicatessen", "Ironmonger",
    "Teahouse", "Cobbler",
]  # fmt: skip

# Typical colours of cloth, ink, paper and paint: none is fully saturated.
CLOTH: tuple[Colour, ...] = (
    (118, 48, 44), (86, 36, 38), (44, 62, 88), (36, 48, 66), (52, 76, 62), (38, 58, 46), (140, 112, 66), (170, 142, 96),
    (92, 72, 56), (66, 54, 48), (176, 166, 148), (206, 198, 180), (120, 124, 126), (74, 80, 88), (150, 84, 56),
    (112, 100, 124), (96, 116, 128), (158, 150, 118), (46, 44, 46), (190, 176, 140),
)  # fmt: skip
INK: tuple[Colour, ...] = ((28, 28, 30), (40, 36, 34), (34, 44, 66), (92, 34, 32), (36, 60, 46), (70, 62, 56))
PAPER: tuple[Colour, ...] = ((236, 232, 222), (226, 220, 204), (214, 216, 214), (232, 222, 196), (218, 226, 222))
PAINT: tuple[Colour, ...] = (
    (58, 76, 70), (44, 60, 80), (110, 44, 42), (70, 66, 62), (150, 140, 120), (92, 108, 96), (64, 84, 104),
    (132, 104, 72), (186, 180, 166), (46, 52, 50),
)  # fmt: skip


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def tone(rng: np.random.Generator, colour: Colour, spread: float = 0.08) -> Colour:
    """The colour with small random changes of brightness and hue, as if faded by light and age."""
    factor = (1 + spread * rng.normal()) * (1 + 0.3 * spread * rng.normal(size=3))
    red, green, blue = np.clip(np.array(colour) * factor, 4, 250).tolist()
    return red, green, blue


def tint(rng: np.random.Generator, factors: Colour, spread: float = 0.05) -> Colour:
    """Slightly varied factors for a material's colours, at most 1.1."""
    red, green, blue = np.clip(np.array(factors) * (1 + spread * rng.normal()), 0.2, 1.1).tolist()
    return red, green, blue


def title(rng: np.random.Generator) -> str:
    noun, other, adjective = pick(rng, _NOUNS), pick(rng, _NOUNS), pick(rng, _ADJECTIVES)
    forms = (f"The {adjective} {noun}", f"{noun} & {other}", f"{adjective} {noun}", f"A {noun} of {other}", noun)
    return pick(rng, forms)


def author(rng: np.random.Generator) -> str:
    return f"{chr(65 + int(rng.integers(26)))}. {pick(rng, _NAMES)}"


def trade(rng: np.random.Generator) -> str:
    return pick(rng, _TRADES)


def shop(rng: np.random.Generator) -> str:
    return pick(rng, (trade(rng), f"{pick(rng, _NAMES)} & Co", f"{pick(rng, _NAMES)}'s {trade(rng)}"))


def date(rng: np.random.Generator) -> str:
    months = ("January", "March", "April", "May", "June", "September", "October", "November")
    return f"{int(rng.integers(1, 29))} {pick(rng, months)} {int(rng.integers(17, 22))}:{int(rng.integers(6)) * 10:02d}"


def sentence(number: int) -> str:
    """One of 48 fixed lines of small print; there are few so that rendered lines can be cached."""
    rng = np.random.default_rng(900 + number % 48)
    words = [
        f"The {pick(rng, _ADJECTIVES)} {pick(rng, _NOUNS)} {pick(rng, _VERBS)} the {pick(rng, _NOUNS)}".capitalize()
        for _ in range(2)
    ]
    return f"{words[0]}, and {words[1].lower()}."


def figures(number: int) -> str:
    """One of 32 fixed rows of departure times."""
    rng = np.random.default_rng(700 + number % 32)
    return "  ".join(f"{int(rng.integers(5, 24)):02d}:{int(rng.integers(60)):02d}" for _ in range(6))
