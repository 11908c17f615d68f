"""What the curves of training runs say: means over seeds, factors between networks, plots.

A run is {"images", "operations", "seconds": of one step, "points": [{"step", measures…}, …]}.
`runs` has a list of them, one for each seed, by the name of the network. The first network is the
one that the others are compared with.
"""

import pathlib

import numpy as np

UNITS = ("steps", "images", "seconds", "operations")
# The measures of a point, and how they are printed.
MEASURES = {
    "distance": ("distance", ".3f"),
    "pixel_distance": ("in pixels", ".2f"),
    "class_agreement": ("class agreement", ".3f"),
    "held_out_loss": ("held-out loss", ".4f"),
    "training_loss": ("training loss", ".4f"),
}
LEVELS = (0.25, 0.5, 0.75, 1.0)  # of the first network's steps


def report(runs: dict[str, list[dict]], real: dict[str, float]) -> dict:
    """The means and deviations after the last step, the factors, and how flat the curves are."""
    first = next(iter(runs.values()))
    measured = [point["step"] for point in first[0]["points"]]
    steps = measured[-1]
    levels = {max(s for s in measured if s <= max(at * steps, measured[0])) for at in LEVELS}
    return {
        "real": real,
        "steps": steps,
        "networks": {name: _last(of_name, first) for name, of_name in runs.items()},
        "factors": [_level(runs, first, step) for step in sorted(levels) if len(measured) > 1],
        "change": _change(first),
        "rank_correlation": _correlation(runs),
    }


def _mean(values) -> list[float]:
    """[mean, standard deviation] over seeds."""
    values = np.asarray(values, float)
    return [float(values.mean()), float(values.std(ddof=int(len(values) > 1)))]


def _last(of_name: list[dict], first: list[dict]) -> dict:
    """A network's measures after its last step; difference: of its distance to the first's.

    There is no difference between networks that were trained for different numbers of steps.
    """
    last, base = ([run["points"][-1] for run in each] for each in (of_name, first))
    row = {name: _mean([point[name] for point in last]) for name in MEASURES if name in last[0]}
    row["steps"] = last[0]["step"]
    if row["steps"] == base[0]["step"]:
        pairs = zip(last, base, strict=True)
        row["difference"] = _mean([one["distance"] - other["distance"] for one, other in pairs])
    # Other programs slow some runs down: the quickest is nearest to the cost.
    row["seconds"] = min(run["seconds"] for run in of_name)
    return row | {"seeds": len(last), "operations": of_name[0]["operations"]}


def _best_so_far(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """(steps, the smallest distance up to each)."""
    steps = np.array([point["step"] for point in run["points"]], float)
    return steps, np.minimum.accumulate([point["distance"] for point in run["points"]])


def steps_to(run: dict, distance: float) -> float:
    """The step at which a run is at a distance, interpolated in its logarithm; NaN: it never is.

    A run that is nearer at its first checkpoint counts as if it arrived there.
    """
    steps, best = _best_so_far(run)
    if best[-1] > distance:
        return float("nan")
    after = int(np.argmax(best <= distance))
    if after == 0:
        return float(steps[0])
    (low, high), (far, near) = steps[after - 1 : after + 1], np.log(best[after - 1 : after + 1])
    return float(low + (high - low) * (far - np.log(distance)) / (far - near))


def _level(runs: dict[str, list[dict]], first: list[dict], step: int) -> dict:
    """How many times fewer steps and so on the networks need for the first's distance at a step.

    Each run is compared with the first network's of the same seed. None: a run does not get there.
    at_least: a run is there at its first checkpoint, and may have been earlier.
    """
    seeds = [_at(run, step) for run in first]
    row: dict = {"step": step, "distance": _mean([level for _, level in seeds]), "networks": {}}
    base = _cost(first)
    for name, of_name in list(runs.items())[1:]:
        arrived = [steps_to(run, level) for run, (_, level) in zip(of_name, seeds, strict=True)]
        if np.isnan(arrived).any():
            row["networks"][name] = None
            continue
        ratios = [reached / mine for (reached, _), mine in zip(seeds, arrived, strict=True)]
        cost = _cost(of_name)
        row["networks"][name] = {
            "at_least": min(arrived) == of_name[0]["points"][0]["step"],
            **{unit: _mean(np.array(ratios) * base[unit] / cost[unit]) for unit in UNITS},
        }
    return row


def _at(run: dict, step: int) -> tuple[float, float]:
    """(the step at which a run first had its best distance up to `step`, that distance)."""
    steps, best = _best_so_far(run)
    level = float(best[steps <= step][-1])
    return steps_to(run, level), level


def _cost(of_name: list[dict]) -> dict[str, float]:
    """Of one step, in each of UNITS."""
    run = of_name[0]
    seconds = min(each["seconds"] for each in of_name)
    return {"steps": 1.0, "images": run["images"], "operations": run["operations"]} | {
        "seconds": seconds
    }


def _change(of_name: list[dict]) -> dict | None:
    """By which share the best distance fell from three quarters of the steps to their end."""
    steps = [point["step"] for point in of_name[0]["points"]]
    since = max((step for step in steps if step <= 0.75 * steps[-1]), default=None)
    if since is None:
        return None
    best = [_best_so_far(run) for run in of_name]
    return {"since": since, "fell": _mean([1 - b[-1] / b[s <= since][-1] for s, b in best])}


def _correlation(runs: dict[str, list[dict]]) -> float | None:
    """Spearman's, of the distance in features with that in pixels, over all points."""
    points = [point for of_name in runs.values() for run in of_name for point in run["points"]]
    if "pixel_distance" not in points[0] or len(points) < 3:
        return None
    ranks = [
        np.argsort(np.argsort([point[name] for point in points]))
        for name in ("distance", "pixel_distance")
    ]
    return float(np.corrcoef(ranks)[0, 1])


# Tables and plots.


def _cell(value: list[float], form: str) -> str:
    return f"{value[0]:{form}} ± {value[1]:{form.lstrip('+')}}"


def tables(report: dict) -> str:
    """Markdown: the networks after the last step, and the factors."""
    networks, real = report["networks"], report["real"]
    first = next(iter(networks))
    columns = [name for name in MEASURES if name in networks[first]]
    titles = ["", "steps", *(MEASURES[name][0] for name in columns)]
    titles += [f"distance less that of {first}", "ms a step", "GFLOP a step"]
    lines = [_row(titles), _row(["---"] * len(titles))]
    for name, row in networks.items():
        cells = [
            f"{row['steps']:,}",
            *(_cell(row[column], MEASURES[column][1]) for column in columns),
        ]
        compared = name != first and "difference" in row
        cells.append(_cell(row["difference"], "+.3f") if compared else "")
        cost = [f"{1000 * row['seconds']:.0f}", f"{row['operations'] / 1e9:.2f}"]
        lines.append(_row([name, *cells, *cost]))
    cells = [f"{real[name]:{MEASURES[name][1]}}" if name in real else "" for name in columns]
    lines.append(_row(["*real training images*", "", *cells, "", "", ""]))
    others = list(networks)[1:]
    if others and report["factors"]:
        lines += ["", _row([f"steps of {first}", "its distance", *others])]
        lines.append(_row(["---"] * (2 + len(others))))
        for level in report["factors"]:
            cells = map(_factors, level["networks"].values())
            lines.append(_row([f"{level['step']:,}", _cell(level["distance"], ".3f"), *cells]))
        lines += ["", "*Times fewer steps · seconds · operations.*"]
    return "\n".join([*lines, *_remarks(report, first)])


def _factors(network: dict | None) -> str:
    if network is None:
        return "not reached"
    cell = " · ".join(_cell(network[unit], ".2f") for unit in ("steps", "seconds", "operations"))
    return f"at least {cell}" if network["at_least"] else cell


def _remarks(report: dict, first: str) -> list[str]:
    lines = []
    if change := report["change"]:
        lines.append(
            f"Between the steps {change['since']:,} and {report['steps']:,} the distance of "
            f"{first} fell by {change['fell'][0]:.1%}."
        )
    if report["rank_correlation"] is not None:
        lines.append(
            "Spearman's correlation of the distances in features and in pixels over all "
            f"checkpoints is {report['rank_correlation']:.3f}."
        )
    return ["", *lines] if lines else []


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(path: pathlib.Path, runs: dict[str, list[dict]], real: dict[str, float]) -> None:
    """Write a plot of the curves, or of the ends of runs that were measured only there."""
    if all(len(run["points"]) == 1 for of_name in runs.values() for run in of_name):
        draw_dots(path, runs)
    else:
        draw_curves(path, runs, real)


def draw_curves(path: pathlib.Path, runs: dict[str, list[dict]], real: dict[str, float]) -> None:
    """Distance and held-out loss against steps and seconds: mean over the seeds, and range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, measure in enumerate(("distance", "held_out_loss")):
        for axis, unit in zip(axes[row], ("steps", "seconds"), strict=True):
            for name, of_name in runs.items():
                x = (
                    np.array([point["step"] for point in of_name[0]["points"]])
                    * _cost(of_name)[unit]
                )
                y = np.array([[point[measure] for point in run["points"]] for run in of_name])
                (line,) = axis.plot(x, y.mean(0), marker=".", label=name)
                axis.fill_between(
                    x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0
                )
            axis.grid(alpha=0.3)
            axis.set_yscale("log")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                ticks("{x:g}")
    for axis in axes[0]:
        axis.axhline(real["distance"], color="grey", linestyle=":", label="real images")
    axes[0][0].set_ylabel("Fréchet distance in features")
    axes[1][0].set_ylabel("held-out loss")
    axes[1][0].set_xlabel("training steps")
    axes[1][1].set_xlabel("seconds of training")
    axes[0][0].legend()
    figure.savefig(path, dpi=110, format="png")


def draw_dots(path: pathlib.Path, runs: dict[str, list[dict]]) -> None:
    """The distance after the last step: a dot for each seed, a bar for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(runs) + 1), layout="constrained")
    axis = figure.subplots()
    for place, of_name in enumerate(runs.values()):
        values = [run["points"][-1]["distance"] for run in of_name]
        axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
        axis.plot(np.mean(values), place, "|", color="C3", markersize=14, markeredgewidth=2)
        if place == 0:
            axis.axvline(np.mean(values), color="grey", linestyle=":")
    axis.set_yticks(range(len(runs)), list(runs))
    axis.invert_yaxis()
    axis.set_xlabel("Fréchet distance (dots: seeds, red: mean, dotted: the first row's mean)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
