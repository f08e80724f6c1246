"""A sweep's trials as a text table, and as pictures for its page."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tuning.space import Value
from tuning.tracking import MOST_HISTORIES, TrialRow, best_trial

_COLOURS = {"finished": "#4a7fc1", "stopped": "#d98a3d"}
_OTHER = "#8a8f98"
_INK = "#7d8187"
"""Readable on white and on black: a picture does not follow the page's colour scheme."""
_FEW = 6
"""An axis of at most this many values shows each of them."""
_SIZE = (4.6, 3.3)
"""Inches. One picture fills a phone's width, and two or three a screen's."""


def write(trials: Sequence[TrialRow], folder: Path, *, metric: str) -> Path:
    """Write trials.txt to `folder` and return its path.

    Args:
        trials: best first, as sorted by tuning.tracking.read_trials.
    """
    text = folder / "trials.txt"
    text.write_text(table(trials, metric=metric) + "\n")
    return text


def table(trials: Sequence[TrialRow], *, metric: str) -> str:
    """One line per trial, in the given order: trial, overrides, metric, epochs, status and the reason of a failure.

    The best trial is marked by an asterisk.
    """
    names = parameter_names(trials)
    best = best_trial(trials)
    head = ["", "trial", *names, metric, "epochs", "status", "reason"]
    rows = [head]
    for row in trials:
        score = "-" if row.score is None else f"{row.score:.4f}"
        values = [text_of(row.overrides.get(name, "-")) for name in names]
        mark = "*" if row is best else ""
        rows.append([mark, row.trial_id, *values, score, str(row.epochs), row.status, row.reason])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plot_epochs(trials: Sequence[TrialRow], *, metric: str) -> Figure:
    """The metric over epochs, one curve per trial: the best one is thick, those that ASHA stopped are orange."""
    with _style():
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        best = best_trial(trials)
        for row in reversed(trials[:MOST_HISTORIES]):  # the best ones on top
            if row.history:
                epochs, values = zip(*row.history, strict=True)
                width, shade = (2.5, 1.0) if row is best else (1.0, 0.7)
                colour = _COLOURS.get(row.status, _OTHER)
                axes.plot(epochs, values, marker="o", markersize=3, linewidth=width, color=colour, alpha=shade)
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def plot_parameter(trials: Sequence[TrialRow], name: str, *, metric: str, band: float | None, mode: str) -> Figure:
    """Each trial's best score over one parameter's value.

    Args:
        band: the noise: scores within it of the best one are shaded; None: unknown.
    """
    with _style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        best = best_trial(trials)
        if band is not None and best is not None and best.score is not None:
            end = best.score - band if mode == "max" else best.score + band
            axes.axhspan(
                min(end, best.score), max(end, best.score), color=_COLOURS["finished"], alpha=0.15, linewidth=0
            )
        _plot_values(axes, name, [row for row in trials if not row.repeat], best)
        axes.set_xlabel(name)
        axes.set_ylabel(metric)
        return figure


def plot_front(trials: Sequence[TrialRow], front: Sequence[TrialRow], objectives: Mapping[str, str]) -> Figure:
    """The first objective over the second, with the Pareto front as a line."""
    first, second = list(objectives)[:2]
    with _style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for row in trials:
            if row.score is not None and second in row.values:
                axes.plot(row.values[second], row.score, "o", markersize=5, color=_COLOURS.get(row.status, _OTHER))
        line = sorted((row.values[second], row.score) for row in front if row.score is not None)
        axes.plot([x for x, _ in line], [y for _, y in line], "-", color=_COLOURS["finished"], linewidth=1.5)
        axes.set_xlabel(second)
        axes.set_ylabel(first)
        return figure


def plot_importance(shares: Mapping[str, float]) -> Figure:
    """One bar per parameter, the largest on top."""
    with _style():
        figure = Figure(figsize=(_SIZE[0], 0.7 + 0.38 * len(shares)), layout="constrained")
        axes = figure.add_subplot()
        names = list(shares)[::-1]
        axes.barh(names, [100 * shares[name] for name in names], color=_COLOURS["finished"], height=0.6)
        axes.set_xlabel("importance, %")
        return figure


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "sdan", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def parameter_names(trials: Sequence[TrialRow]) -> list[str]:
    """All overridden names, sorted."""
    return sorted({name for row in trials for name in row.overrides})


def text_of(value: Value) -> str:
    """Floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot_values(axes: Axes, name: str, trials: Sequence[TrialRow], best: TrialRow | None) -> None:
    scored = [(row, row.score) for row in trials if row.score is not None]
    values = [row.overrides.get(name, "-") for row, _ in scored]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        positions = [float(value) for value in values]
        if positions and min(positions) > 0 and max(positions) >= 8 * min(positions):
            axes.set_xscale("log")
        if 0 < len(set(positions)) <= _FEW:
            axes.set_xticks(sorted(set(positions)), [f"{position:g}" for position in sorted(set(positions))])
            axes.minorticks_off()
    else:
        texts = sorted({str(value) for value in values})
        positions = [float(texts.index(str(value))) for value in values]
        axes.set_xticks(range(len(texts)), texts)
    points = list(zip(positions, scored, strict=True))
    for status in sorted({row.status for row, _ in scored}):
        group = [(x, score) for x, (row, score) in points if row.status == status and row is not best]
        xs, ys = [x for x, _ in group], [y for _, y in group]
        axes.plot(xs, ys, "o", markersize=5, color=_COLOURS.get(status, _OTHER))
    for x, (row, score) in points:
        if row is best:
            axes.plot(x, score, "*", markersize=13, color=_COLOURS.get(row.status, _OTHER))


@contextmanager
def _style() -> Iterator[None]:
    """Grey ink on a transparent ground, without a frame above and to the right."""
    settings: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    )
    settings |= {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
    }
    settings |= {"axes.grid": True, "grid.color": _INK, "grid.alpha": 0.2, "font.size": 9.5}
    with mpl.rc_context(settings):
        yield
