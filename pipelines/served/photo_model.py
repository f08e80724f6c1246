"""A registered version as an MLflow model: MLflow copies this script into the version, and runs it to load the model.

What it does is in `pipelines.served.answer` of the installed SDAN, so that this copy need not change.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class PhotoModel(PythonModel):
    """Zooms photographs: column `photo`, the bytes of a file, -> column `png`. Column `name` is optional."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint inside the version."""
        from pipelines.zoom import Zoomer

        self._zoomer = Zoomer.load(Path(context.artifacts["checkpoint"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One PNG per row, as `sdan zoom` writes it. Raises MlflowException: a photograph that cannot be zoomed."""
        from pipelines.served.answer import zoomed_png

        names = model_input["name"] if "name" in model_input else [None] * len(model_input)
        try:
            return pd.DataFrame(
                {"png": [zoomed_png(self._zoomer, *row) for row in zip(model_input["photo"], names, strict=True)]}
            )
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(PhotoModel())
