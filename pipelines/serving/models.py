"""The models that the service uses, and their exchange when the registry gets another champion."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from pipelines import registry
from pipelines.zoom import Zoomer, load_models
from pipelines.zooming.models import choose_models
from preprocessing.storage import one_line
from sdan import STARTERS

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """Loaded models, for RAW and for pictures."""

    name: str
    """What they are, for people."""
    version: str | None
    """The champion's version; None if no champion is followed."""
    raw: Zoomer
    pictures: Zoomer


class Models:
    """The models in use. `current` is replaced as a whole, so a request keeps the models that it began with."""

    def __init__(self, data: Path, uri: str | None) -> None:
        """Load them.

        Args:
            data: the --data folder.
            uri: as `choose_models` takes it. None and models:/sdan@champion follow the champion.

        Raises:
            RegistryError, CheckpointError: no such model.
        """
        self._data, self._uri = data, uri
        self._tracking_uri = registry.default_tracking_uri(data)
        self._follows = uri in (None, registry.CHAMPION_URI)
        self._failed: str | None = None
        self.current = self._load(self._champion())

    def refresh(self) -> bool:
        """If there is another champion, load it beside the current one and then use it. Returns whether it changed.

        A champion that cannot be loaded is logged once, and the current models stay.
        """
        if not self._follows:
            return False
        version = self._champion()
        if version == self.current.version or version is None or version == self._failed:
            return False
        try:
            self.current = self._load(version)
        except ValueError as error:
            self._failed = version
            _LOG.error("champion %s: %s; still using %s", version, one_line(error), self.current.name)
            return False
        return True

    def watch(self, stop: threading.Event, every_s: float) -> None:
        """`refresh` until `stop` is set. An unreachable registry changes nothing."""
        while not stop.wait(every_s):
            try:
                self.refresh()
            except Exception as error:  # MLflow, its database and its server raise many kinds
                _LOG.warning("registry: expected an answer, got %s", one_line(error))

    def _champion(self) -> str | None:
        found = registry.get_champion(self._tracking_uri) if self._follows else None
        return None if found is None else str(found.version)

    def _load(self, version: str | None) -> Served:
        chosen = choose_models(self._data, self._uri)
        raw, pictures = load_models(chosen)
        for zoomer in (raw, pictures):
            zoomer.wait()
        return Served(self._name(version), version, raw, pictures)

    def _name(self, version: str | None) -> str:
        if version:
            return f"{registry.MODEL} version {version}"
        if self._uri is None:
            return " and ".join(STARTERS)
        # Of a folder the last part: clients need not know this machine's folders.
        return self._uri if self._uri.startswith(("models:/", "runs:/")) else Path(self._uri).resolve().name
