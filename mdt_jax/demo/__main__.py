"""A page in the browser: python -m mdt_jax.demo --checkpoint=runs/digits --workdir=runs

Draw samples, watch them appear, inpaint, and follow the runs of a folder. The page is served on
this machine alone; the link is printed. It needs gradio: pip install "mdt_jax[demo]".
"""

import argparse

from mdt_jax import cli
from mdt_jax.demo.server import LOADED, serve
from mdt_jax.runtime.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.demo",
        usage="python -m mdt_jax.demo [--checkpoint=PATH] [--workdir=FOLDER] [--port=NUMBER]",
        description="Open a page to draw, inpaint and follow runs.",
    )
    add = parser.add_argument
    add("--checkpoint", type=cli.anywhere_or_hub, help="what to draw with; default: the workdir")
    add("--workdir", type=cli.anywhere, help="a run to follow, or a folder of runs")
    add("--port", type=int, default=7860, help="of 127.0.0.1; 0: a free one (default: 7860)")
    add("--dtype", choices=cli.DTYPES, help="of matmuls and activations (default: the run's)")
    add("--vae", type=cli.anywhere_or_hub, help="as of mdt_jax.sample")
    add("--vae_scale", type=cli.positive, help="as of mdt_jax.sample")
    parser.add_unrecorded()
    args = parser.parse_args(argv[1:])
    if not (args.checkpoint or args.workdir):
        raise UserError("give --checkpoint=PATH to draw, --workdir=FOLDER to follow a run, or both")
    return args


def main(argv: list[str]) -> None:
    """Load the checkpoint, and serve the page until Ctrl-C."""
    args = parse(argv)
    cli.start(args, keep_memory=True)
    loaded = {name: getattr(args, name) for name in LOADED}
    serve(args.checkpoint, args.workdir, port=args.port, **loaded).wait()


if __name__ == "__main__":
    cli.run(main)
