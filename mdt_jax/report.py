"""Report a run: python -m mdt_jax.report --workdir=runs/digits

Writes report.html to the workdir, one file with the run's curves, sample grids, measurements and
config, and curves.png. The run may still be training. Training writes both when it ends.
"""

import argparse

from mdt_jax import cli
from mdt_jax.runtime.progress import print_result
from mdt_jax.train import page, record


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.report",
        usage="python -m mdt_jax.report --workdir=FOLDER",
        description="Write a run's curves, samples, measurements and config as one HTML file.",
    )
    parser.add_argument("--workdir", required=True, type=cli.anywhere, help="the folder of a run")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    """Read the workdir and write the page."""
    args = parse(argv)
    found = record.read(args.workdir)
    png, html = page.write(found)
    print_result(f"wrote {html} and {png}: {found.state}")


if __name__ == "__main__":
    cli.run(main)
