"""darktable's format of an upscaler: a folder that is named as the model's id, with config.json and model_x4.onnx.

Its keys were read in darktable's source (src/ai/backend_common.c, src/common/ai_models.c). darktable cuts the picture
into square sRGB tiles of 192 to 768 px, fixes `height` and `width` of the ONNX file to that, and drops 16 px on each
side of a tile.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sdan import SDANConfig
from sdan.export import ExportError

CONFIG = "config.json"
_SCALES = (2, 4)


def check(out: Path, config: SDANConfig) -> None:
    """Raise ExportError unless darktable can use such a model under this name."""
    if not config.is_rgb:
        raise ExportError(
            "--model: expected an RGB model for darktable, which gives it sRGB tiles, got one that reads RAW; "
            "use --model starter-rgb or --format onnx"
        )
    if config.scale not in _SCALES:
        raise ExportError(f"--model: expected a scale of 2 or 4 for darktable, got {config.scale}; use --format onnx")
    if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", out.name):
        raise ExportError(
            f"-o {out}: expected a folder named like a darktable model, e.g. upscale-sdan, got {out.name!r}; rename it"
        )


def model_name(config: SDANConfig) -> str:
    """The name under which darktable looks for the ONNX file."""
    return f"model_x{config.scale}.onnx"


def config_json(out: Path, config: SDANConfig, metadata: dict[str, str]) -> str:
    """The text of config.json."""
    described = {
        "id": out.name,
        "name": out.name.replace("-", " "),
        "description": f"SDAN, {config.scale}x: optical zoom learnt from zoom sequences",
        "task": "upscale",
        "arch": "sdan",
        "backend": "onnx",
        "version": "1.0",
        "tiling": True,
        "num_inputs": 1,
        "model_card": {
            "scope": f"image upscaling, {config.scale}x",
            "source": f"SDAN {metadata['sdan_version']}",
            **({"license": metadata["licence"]} if "licence" in metadata else {}),
        },
    }
    return json.dumps(described, indent=2) + "\n"
