"""The record of a run as one HTML file, which needs no other file, and its curves as a PNG."""

import base64
import json
from html import escape

from mdt_jax.evaluation.card import TITLES
from mdt_jax.runtime.files import Path, atomic_write, fetched, is_file
from mdt_jax.train import curves
from mdt_jax.train.record import Record

CURVES, PAGE = "curves.png", "report.html"
GRIDS = 20  # the most sample grids of a page
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
figure { margin: 0 } img, svg { max-width: 100%; height: auto } img { image-rendering: pixelated }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  overflow-wrap: anywhere; vertical-align: top; font-weight: normal }
td { font-variant-numeric: tabular-nums } input[type=range] { width: min(30rem, 100%) }
"""
# Shows the grid that the slider is at. Without scripts, all grids are shown.
SCRIPT = """
const slider = document.getElementById("step"), grids = document.querySelectorAll("figure.grid");
function show() {
  grids.forEach((grid, i) => { grid.hidden = i != slider.value; });
  slider.setAttribute("aria-valuetext", "step " + grids[slider.value].dataset.step);
}
document.getElementById("slider").hidden = false;
slider.addEventListener("input", show);
show();
"""


def write(record: Record) -> tuple[Path, Path]:
    """Write curves.png and report.html to the workdir, atomically; returns their paths."""
    figure = curves.draw(record.series)
    png, page = record.workdir / CURVES, record.workdir / PAGE
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    text = html(record)
    with atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return png, page


def html(record: Record) -> str:
    """The page. Names and values of the run are escaped."""
    name = escape(str(record.workdir))
    parts = [f"<h1>{name}</h1>", f"<p>{escape(record.state.capitalize())}.</p>", results(record)]
    if record.series:
        parts.append(_section("Curves", plots(record.series)))
    if record.grids:
        parts.append(_section("Samples by step", _grids(record.grids)))
    final = record.workdir / "samples.png"
    if record.report and is_file(final):
        picture = _image(final, "samples after the last step")
        parts.append(_section("Samples after the last step", picture))
    parts.append(config(record))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def results(record: Record) -> str:
    """What report.json says, and which checkpoint is in best/."""
    parts = []
    if record.report:
        parts.append(_section("Result", _table(_titled(record.report))))
    if record.best is not None:
        rows = {"Step": record.best, **_titled(record.measured(record.best))}
        parts.append(_section("Best checkpoint", _table(rows)))
    return "\n".join(parts)


def config(record: Record) -> str:
    """All fields of the config, folded up."""
    fields = {f"{g}.{n}": value for g, group in record.config.items() for n, value in group.items()}
    return _section("Config", f"<details><summary>All fields</summary>{_table(fields)}</details>")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>"


def _titled(values: dict) -> dict:
    """The values with the titles of metrics for their names."""
    titles = [str(TITLES.get(name, name.replace("_", " "))) for name in values]
    return {
        title[:1].upper() + title[1:]: value
        for title, value in zip(titles, values.values(), strict=True)
    }


def _table(rows: dict[str, object]) -> str:
    cells = "\n".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_text(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int else json.dumps(value) if value != "" else "–"


def plots(series: curves.Series) -> str:
    """An SVG element for each panel."""
    parts = [
        curves.svg(curves.draw_panel(title, lines), title)
        for title, lines in curves.panels(series).items()
    ]
    return f'<div class="plots">{"".join(parts)}</div>'


def _grids(grids: dict[int, Path]) -> str:
    """A slider over pictures, of which at most GRIDS are taken, among them the last."""
    every = -(-len(grids) // GRIDS)
    shown = list(grids.items())[::-1][::every][::-1]
    figures = "\n".join(
        f'<figure class="grid" data-step="{step}">{_image(path, f"samples at step {step:,}")}'
        f"<figcaption>Step {step:,}</figcaption></figure>"
        for step, path in shown
    )
    last = len(shown) - 1
    slider = (
        f'<p id="slider" hidden><label>Step <input type="range" id="step" min="0" max="{last}" '
        f'value="{last}"></label></p>'
    )
    return f"{slider}\n{figures}\n<script>{SCRIPT}</script>"


def _image(path: Path, label: str) -> str:
    data = base64.b64encode(fetched(path).read_bytes()).decode()
    return f'<img alt="{escape(label)}" src="data:image/png;base64,{data}">'
