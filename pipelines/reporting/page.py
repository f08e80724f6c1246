"""Renders report.html. The page needs no network, and its Content-Security-Policy blocks external content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import escape

from pipelines.reporting.contents import TARGET, Crop, Report
from pipelines.reporting.histogram import histogram, limits
from pipelines.reporting.pictures import ERROR_LIMIT, error_map, error_scale, offset_colours, offset_wheel, uri
from preprocessing.report.page import policy_hash, templates
from preprocessing.storage import write_atomically

FILE = "report.html"


def write_report(path: Path, report: Report) -> None:
    """Write the page in one step; a reader never sees half of it."""
    write_atomically(path, render(report).encode())


def render(report: Report) -> str:
    """The page as HTML."""
    here = Path(__file__).parent
    style, script = ((here / f"report.{kind}").read_text() for kind in ("css", "js"))
    reach = _reach(report)
    return (
        templates(here)
        .get_template("report.html.j2")
        .render(
            report=report,
            target=TARGET,
            crops=[_shown(crop, reach) for crop in report.crops],
            histograms=_histograms(report),
            scale=uri(error_scale()) if report.crops else "",
            error_limit=ERROR_LIMIT,
            wheel=uri(offset_wheel()) if reach else "",
            reach=reach,
            style=style,
            script=script,
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
        )
    )


def _shown(crop: Crop, reach: float) -> dict[str, Any]:
    """The pictures of a crop as data: URIs: `pictures` and `errors` by label, and `offset` ("" if there is none)."""
    target = crop.pictures[TARGET]
    return {
        "name": crop.name,
        "why": crop.why,
        "pictures": {label: uri(picture) for label, picture in crop.pictures.items()},
        "errors": {
            label: uri(error_map(picture, target)) for label, picture in crop.pictures.items() if label != TARGET
        },
        "mean_error": {
            label: float(np.abs(picture.astype(np.float32) - target).mean())
            for label, picture in crop.pictures.items()
            if label != TARGET
        },
        "offset": uri(offset_colours(crop.offset_px, reach)) if crop.offset_px is not None else "",
        "width": target.shape[1],
        "height": target.shape[0],
    }


def _reach(report: Report) -> float:
    """The 99th percentile of all shown offsets' lengths in mosaic pixels, at least 0.1; 0 if there are none."""
    lengths = [np.hypot(*crop.offset_px).ravel() for crop in report.crops if crop.offset_px is not None]
    return max(0.1, float(np.nanquantile(np.concatenate(lengths), 0.99))) if lengths else 0.0


def _histograms(report: Report) -> dict[str, str]:
    """Method -> histogram of its differences from the baseline, on one scale; {} if there is no baseline."""
    base = next((method.psnr for method in report.methods if method.label == report.baseline), None)
    if base is None:
        return {}
    differences = {
        method.label: np.subtract(method.psnr, base) for method in report.methods if method.label != report.baseline
    }
    low, high = limits([each.tolist() for each in differences.values()])
    return {
        label: histogram(each.tolist(), low, high, str(escape(f"{label} minus {report.baseline}, dB, tile by tile")))
        for label, each in differences.items()
    }
