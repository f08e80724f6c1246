"""Writes a checkpoint as an MLflow 3 model: models from code, so nothing is pickled.

The model's folder holds the script `served/photo_model.py`, the checkpoint, the signature, an input example and the
exact versions of the packages that a zoom needs. Only MLflow's client is used: nothing is set globally.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model, ModelSignature
    from pandas import DataFrame

from sdan.checkpoint import TRAINER

CHECKPOINT = "checkpoint"
"""Name of the checkpoint among the model's artifacts."""
MODEL_TAG = "sdan.logged_model"
"""Tag of a version: the id of its MLflow model. MLflow's sqlite registry does not give `ModelVersion.model_id` back."""
_SCRIPT = Path(__file__).parents[1] / "served" / "photo_model.py"
_SERVING = ("mlflow", "pandas")
"""Packages that serving needs and a zoom on the command line does not."""


def log_checkpoint(client: MlflowClient, run: Run, checkpoint: Path, scores: Mapping[str, float]) -> LoggedModel:
    """Log a checkpoint folder, without the optimizer's state, as a model of the run, with its scores as metrics."""
    from mlflow.entities import LoggedModelOutput, Metric

    run_id = run.info.run_id
    model = client.create_logged_model(
        run.info.experiment_id, name="sdan", source_run_id=run_id, params=dict(run.data.params)
    )
    try:
        with tempfile.TemporaryDirectory(prefix="sdan-register-") as place:
            copy, folder = Path(place) / CHECKPOINT, Path(place) / "model"
            copy.mkdir()
            for file in sorted(checkpoint.iterdir()):
                if file.is_file() and file.name != TRAINER:  # it serves only to resume
                    shutil.copyfile(file, copy / file.name)
            _write(folder, copy, model.model_id, run_id)
            client.log_model_artifacts(model.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    now = int(1000 * time.time())
    metrics = [Metric(name, value, now, 0, model_id=model.model_id, run_id=run_id) for name, value in scores.items()]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
    return client.finalize_logged_model(model.model_id, "READY")


def tag_of(model: LoggedModel) -> str:
    """What a run's tag says about it."""
    return f"models:/{model.model_id}"


def checkpoint_of_version(version: ModelVersion) -> str:
    """The address of a version's checkpoint; a version before 0.3 is the checkpoint itself."""
    return _inside(str(version.source)) if MODEL_TAG in version.tags else str(version.source)


def checkpoint_of_tag(client: MlflowClient, tag: str) -> str | None:
    """The address of the checkpoint that a run's tag names; None for a tag from before 0.3."""
    if not tag.startswith("models:/"):
        return None
    return _inside(client.get_logged_model(tag.removeprefix("models:/")).artifact_location)


def _inside(location: str) -> str:
    return f"{location}/artifacts/{CHECKPOINT}"


def _write(folder: Path, checkpoint: Path, model_id: str, run_id: str) -> None:
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    described = Model(artifact_path="sdan", model_uuid=model_id, run_id=run_id, model_id=model_id)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with _quiet():
        save_model(
            folder,
            python_model=_SCRIPT,
            artifacts={CHECKPOINT: str(checkpoint)},
            signature=_signature(),
            input_example=_example(),
            pip_requirements=pinned_requirements(),
            mlflow_model=described,
        )
    _without_paths(described, folder)
    for compiled in folder.rglob("__pycache__"):
        shutil.rmtree(compiled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's notes about its own progress."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _without_paths(described: Model, folder: Path) -> None:
    """Write MLmodel again without the places that the script and the checkpoint were copied from."""
    from mlflow.models.model import MLMODEL_FILE_NAME

    flavor = described.flavors["python_function"]
    flavor["model_code_path"] = _SCRIPT.name  # MLflow looks for this name in the folder
    flavor["artifacts"][CHECKPOINT]["uri"] = flavor["artifacts"][CHECKPOINT]["path"]
    described.save(folder / MLMODEL_FILE_NAME)


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    photo, name = ColSpec(DataType.binary, "photo"), ColSpec(DataType.string, "name", required=False)
    return ModelSignature(Schema([photo, name]), Schema([ColSpec(DataType.binary, "png")]))


def _example() -> DataFrame:
    """A small photograph: a grey ramp."""
    import pandas as pd
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize((32, 24)).convert("RGB").save(file, "PNG")
    return pd.DataFrame({"photo": [file.getvalue()], "name": ["photo.png"]})


def pinned_requirements() -> list[str]:
    """SDAN, what its base installation needs, and MLflow, in the versions that are installed here."""
    needed = [each for each in requires("sdan") or [] if "extra ==" not in each]
    names = [re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in needed]
    pinned = []
    for name in ("sdan", *names, *_SERVING):
        try:
            pinned.append(f"{name}=={version(name).partition('+')[0]}")  # a local version is in no index
        except PackageNotFoundError:
            continue
    return pinned
