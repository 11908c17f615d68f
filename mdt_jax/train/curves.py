"""The curves of a run: the series of metrics.jsonl, in panels, and their plots."""

import io
import json
import os
import threading
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from mdt_jax.evaluation.card import TITLES
from mdt_jax.runtime.errors import DamagedError
from mdt_jax.train.log import read_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = {1: "q1, least noise", 2: "q2", 3: "q3", 4: "q4, most noise"}
# Title → the metrics of a panel with their labels. Panels without values are left out.
PANELS: dict[str, dict[str, str]] = {
    "Loss": {"loss/full": "full pass", "loss/masked": "masked pass"},
    **{
        f"Squared error, {name} pass, by quarter of the timesteps": {
            f"mse/{name}/q{q}": label for q, label in QUARTERS.items()
        }
        for name in ("full", "masked")
    },
    "Gradient norm": {"grad_norm": ""},
    "Learning rate": {"learning_rate": ""},
    "Images per second": {"images_per_second": ""},
    "Share of the time spent waiting for data": {"data_wait": ""},
    **{f"{title[0].upper()}{title[1:]}": {name: ""} for name, title in TITLES.items()},
}
LOGARITHMIC = ("loss", "mse", "grad_norm")  # the first parts of names of metrics
HEIGHT = 2.6  # inches of a panel
RC = threading.Lock()  # matplotlib's settings are of the process
POINTS = 1000  # the most of a curve that are drawn

Series = dict[str, tuple[np.ndarray, np.ndarray]]


def read(path: str | os.PathLike) -> Series:
    """The (steps, values) of each metric in a metrics.jsonl; null becomes NaN.

    {} where there is no file. Raises UserError for a line that holds no metrics.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step, line in read_steps(path):
        for name, value in json.loads(line).items():
            if name != "step" and (value is None or isinstance(value, (int, float))):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                try:
                    values.append(np.nan if value is None else float(value))
                except OverflowError:
                    raise DamagedError(f"{path}: {name} of step {step} is too large") from None
    return {
        name: (np.array(steps), np.array(values, float)) for name, (steps, values) in found.items()
    }


def panels(series: Series) -> dict[str, Series]:
    """Title → the series of a panel, by label."""
    found = {}
    for title, names in PANELS.items():
        there = {label: thinned(*series[name]) for name, label in names.items() if name in series}
        if there:
            found[title] = there
    return found


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, each the mean of as many neighbours."""
    size = -(-len(steps) // POINTS)
    if size < 2:
        return steps, values
    starts = np.arange(0, len(steps), size)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(int), starts)
    sums = np.add.reduceat(np.where(finite, values, 0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return steps[np.minimum(starts + size, len(steps)) - 1], means


def draw(series: Series) -> "Figure":
    """All panels in two columns, 960 pixels wide at 100 dots an inch."""
    from matplotlib.figure import Figure

    drawn = panels(series)
    rows = max(1, -(-len(drawn) // 2))
    figure = Figure(figsize=(9.6, HEIGHT * rows))
    figure.subplots_adjust(0.07, 0.5 / HEIGHT / rows, 0.98, 1 - 0.25 / HEIGHT / rows, 0.2, 0.35)
    for number, (title, curves) in enumerate(drawn.items(), start=1):
        _draw(figure.add_subplot(rows, 2, number), title, curves)
    return figure


def draw_panel(title: str, curves: Series) -> "Figure":
    """One of `panels`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, HEIGHT))
    figure.subplots_adjust(0.13, 0.17, 0.97, 0.9)
    _draw(figure.add_subplot(), title, curves)
    return figure


def _draw(axes: Any, title: str, curves: Series) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for label, (steps, values) in curves.items():
        axes.plot(steps, values, ".-" if len(steps) < 20 else "-", label=label, linewidth=1)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    if next(iter(PANELS[title])).split("/")[0] in LOGARITHMIC:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)) if high < 50 * low else NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if _negative(curves) else 0)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=7, loc="upper right")


def _negative(curves: Series) -> bool:
    """Whether a value is below 0, as an unbiased KID may be."""
    return any((values < 0).any() for _, values in curves.values())


def svg(figure: "Figure", label: str) -> str:
    """A figure as an SVG element of a page, with its text as text; label: for screen readers."""
    from matplotlib import rc_context

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with RC, rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    return f'<svg role="img" aria-label="{escape(label)}"' + text[text.index("<svg") + 4 :]
