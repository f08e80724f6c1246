"""The summary of a sweep: its trials as a text table, and plots of the metric over epochs and over each parameter."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tuning.space import Value
from tuning.tracking import TrialRow, best_trial

_COLOURS = {"finished": "tab:blue", "stopped": "tab:orange"}


def write(trials: Sequence[TrialRow], folder: Path, *, metric: str, mode: str) -> list[Path]:
    """Write trials.txt, epochs.png and parameters.png to `folder` and return their paths.

    Args:
        trials: best first, as sorted by tuning.tracking.read_trials.
    """
    text = folder / "trials.txt"
    text.write_text(table(trials, metric=metric) + "\n")
    epochs = folder / "epochs.png"
    _save(plot_epochs(trials, metric=metric), epochs)
    parameters = folder / "parameters.png"
    _save(plot_parameters(trials, metric=metric, mode=mode), parameters)
    return [text, epochs, parameters]


def table(trials: Sequence[TrialRow], *, metric: str) -> str:
    """One line per trial, in the given order: trial, overrides, metric, epochs, status and the reason of a failure.

    The best trial is marked by an asterisk.
    """
    names = _parameter_names(trials)
    best = best_trial(trials)
    head = ["", "trial", *names, metric, "epochs", "status", "reason"]
    rows = [head]
    for row in trials:
        score = "-" if row.score is None else f"{row.score:.4f}"
        values = [_text(row.overrides.get(name, "-")) for name in names]
        mark = "*" if row is best else ""
        rows.append([mark, row.trial_id, *values, score, str(row.epochs), row.status, row.reason])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plot_epochs(trials: Sequence[TrialRow], *, metric: str) -> Figure:
    """The metric over epochs, one curve per trial: the best one is thick, those that ASHA stopped are orange."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    best = best_trial(trials)
    for row in trials:
        if row.history:
            epochs, values = zip(*row.history, strict=True)
            colour = _COLOURS.get(row.status, "tab:gray")
            width = 2.5 if row is best else 1.0
            label = f"{row.trial_id} {row.status}" + (" (best)" if row is best else "")
            axes.plot(epochs, values, marker="o", markersize=3, linewidth=width, color=colour, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 0 < len(axes.lines) <= 12:
        axes.legend(fontsize=8)
    return figure


def plot_parameters(trials: Sequence[TrialRow], *, metric: str, mode: str) -> Figure:
    """Each trial's best metric over the parameter's value, one panel per parameter."""
    names = _parameter_names(trials) or ["-"]
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    best = best_trial(trials)
    for name, axes in zip(names, panels, strict=True):
        _plot_parameter(axes, name, trials, best)
        axes.set_xlabel(name)
    panels[0].set_ylabel(f"best {metric} of the trial ({'higher' if mode == 'max' else 'lower'} is better)")
    return figure


def _parameter_names(trials: Sequence[TrialRow]) -> list[str]:
    """All overridden names, sorted."""
    return sorted({name for row in trials for name in row.overrides})


def _plot_parameter(axes: Axes, name: str, trials: Sequence[TrialRow], best: TrialRow | None) -> None:
    scored = [(row, row.score) for row in trials if row.score is not None]
    values = [row.overrides.get(name, "-") for row, _ in scored]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        positions = [float(value) for value in values]
        if positions and min(positions) > 0 and max(positions) >= 10 * min(positions):
            axes.set_xscale("log")
    else:
        texts = sorted({str(value) for value in values})
        positions = [float(texts.index(str(value))) for value in values]
        axes.set_xticks(range(len(texts)), texts)
    for position, (row, score) in zip(positions, scored, strict=True):
        axes.plot(
            position,
            score,
            marker="*" if row is best else "o",
            markersize=14 if row is best else 6,
            color=_COLOURS.get(row.status, "tab:gray"),
        )


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
