"""sweep.html: what a sweep found, on one self-contained page.

The page (sweep.html.j2, sweep.css) has no script, and its Content-Security-Policy blocks external content.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from tuning import summary
from tuning.folder import PAGE, Record, Refused
from tuning.importance import importance, pareto_front
from tuning.search import optuna_space
from tuning.space import Space, Value
from tuning.tracking import SECONDS, TrialRow, best_trial
from tuning.winners import Verdict, setting_text

_SHOWN = 40
"""Most rows of a table."""
_PICTURE_BYTES = 3_000_000
_KINDS = {".jpg": "image/jpeg", ".png": "image/png"}


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    name: str
    objectives: Mapping[str, str]
    """Metric -> max or min; the first decides."""
    trials: Sequence[TrialRow]
    """Best first, with repeats."""
    verdict: Verdict
    refused: Refused
    space: Space
    default: Mapping[str, Value] | None
    command: str
    """Trains the chosen setting at full length; '' if unknown."""
    crops: Path
    """Folder of the trials' pictures, TRIAL_ID.jpg or .png."""
    record: Record
    short: str
    """Why not all trials ended; '' if they did."""

    @property
    def metric(self) -> str:
        return next(iter(self.objectives))

    @property
    def searched(self) -> list[TrialRow]:
        """The trials without repeats."""
        return [row for row in self.trials if not row.repeat]


@dataclass(frozen=True)
class Picture:
    """One trial's crops."""

    label: str
    row: TrialRow
    uri: str


def write(report: Report, folder: Path) -> Path:
    """Write sweep.html to `folder` and return its path."""
    path = folder / PAGE
    aside = path.with_suffix(".part")
    aside.write_text(render(report), encoding="utf-8")
    aside.replace(path)
    return path


def render(report: Report) -> str:
    """The page as HTML."""
    here = Path(__file__).parent
    style = (here / "sweep.css").read_text()
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"score": _score, "value": summary.text_of, "setting": setting_text}
    searched = report.searched
    front = pareto_front(searched, report.objectives) if len(report.objectives) > 1 else []
    lost = [row for row in searched if row.status not in ("finished", "stopped")]
    return pages.get_template("sweep.html.j2").render(
        report=report,
        names=summary.parameter_names(searched),
        best=best_trial(searched),
        shown=[row for row in searched if row.score is not None][:_SHOWN],
        left_out=max(0, sum(row.score is not None for row in searched) - _SHOWN),
        repeats=[row for row in report.trials if row.repeat],
        counts={status: sum(row.status == status for row in searched) for status in ("finished", "stopped", "failed")},
        lost=lost[:_SHOWN],
        refused=list(report.refused.reasons.items())[:_SHOWN],
        pictures=_pictures(report),
        charts=_charts(report, front),
        front=front,
        seconds=SECONDS,
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _charts(report: Report, front: Sequence[TrialRow]) -> dict[str, Any]:
    """SVG pictures as data: URIs."""
    searched, metric, mode = report.searched, report.metric, next(iter(report.objectives.values()))
    shares = importance(searched, optuna_space(report.space), mode=mode)
    noise = report.verdict.noise
    scored = [row for row in searched if row.score is not None]
    names = summary.parameter_names(searched) if scored else []
    curves = any(len(row.history) > 1 for row in scored)
    return {
        "importance": _uri(summary.plot_importance(shares)) if shares else "",
        "shares": shares,
        "parameters": {
            name: _uri(summary.plot_parameter(searched, name, metric=metric, band=noise, mode=mode)) for name in names
        },
        "epochs": _uri(summary.plot_epochs(searched, metric=metric)) if curves else "",
        "front": _uri(summary.plot_front(searched, front, report.objectives)) if front else "",
    }


def _uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(summary.svg(figure)).decode()


def _pictures(report: Report) -> list[Picture]:
    """Crops of the best finished trial, of the default setting and of the worst, those that have any."""
    finished = [row for row in report.searched if row.status == "finished" and row.score is not None]
    if not finished:
        return []
    wanted = {"best": finished[0]}
    default = next((row for row in finished if row.overrides == report.default), None)
    if default is not None:
        wanted["default"] = default
    wanted["worst"] = finished[-1]
    pictures: dict[str, Picture] = {}
    for label, row in wanted.items():
        uri = _picture(report.crops, row.trial_id)
        known = pictures.get(row.trial_id)
        if uri:
            pictures[row.trial_id] = Picture(f"{known.label}, {label}" if known else label, row, uri)
    return list(pictures.values())


def _picture(folder: Path, trial_id: str) -> str:
    """A trial's crops as a data: URI; '' if it has none."""
    for suffix, kind in _KINDS.items():
        path = folder / f"{trial_id}{suffix}"
        if path.is_file() and path.stat().st_size <= _PICTURE_BYTES:
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return ""


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
