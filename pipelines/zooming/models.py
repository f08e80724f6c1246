"""Which model zooms which photograph: RAW, or a picture (JPG, PNG, TIFF, WebP, AVIF)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines import registry
from sdan import STARTER, STARTER_RGB, checkpoint, starter_folder


@dataclass(frozen=True)
class Chosen:
    """Checkpoint folders, and lines for the user where no --model says which models these are."""

    for_raw: Path
    for_pictures: Path
    note: str = ""
    """About all photographs."""
    raw_note: str = ""
    """About each RAW."""
    picture_note: str = ""


def choose_models(data: Path, uri: str | None) -> Chosen:
    """The models of `sdan zoom`.

    Args:
        uri: a model URI (registry.resolve_model) for all photographs; None: the champion for the kind that it reads and
            the starter model for the other, or both starter models if there is no champion.

    Raises:
        RegistryError, CheckpointError: no such model.
    """
    tracking_uri = registry.default_tracking_uri(data)
    if uri is not None:
        folder = registry.resolve_model(tracking_uri, uri)
        return Chosen(folder, folder)
    for_raw, for_pictures = starter_folder(STARTER), starter_folder(STARTER_RGB)
    if registry.get_champion(tracking_uri) is None:
        line = "no champion in the registry yet: using the starter models, which saw only simulated photographs"
        return Chosen(for_raw, for_pictures, note=line)
    champion = registry.resolve_model(tracking_uri, registry.CHAMPION_URI)
    network = checkpoint.load(champion).model.config
    if network.scale != checkpoint.load(for_raw).model.config.scale:
        return Chosen(champion, champion)
    if network.is_rgb:
        return Chosen(for_raw, champion, raw_note=f"the champion does not read RAW; zoomed with {STARTER}")
    return Chosen(champion, for_pictures, picture_note=f"the champion reads RAW; zoomed with {STARTER_RGB}")
