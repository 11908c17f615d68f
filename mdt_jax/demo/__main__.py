"""A page in the browser: python -m mdt_jax.demo --checkpoint=runs/digits --workdir=runs

Draw samples, watch them appear, inpaint, and follow the runs of a folder. The page is served on
this machine alone; the link is printed. It needs gradio: pip install "mdt_jax[demo]".
"""

import argparse
import os
import tempfile

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import as_path
from mdt_jax.runtime.progress import log, print_result
from mdt_jax.sampling.pipeline import Pipeline

UPLOAD = "20mb"  # the largest picture


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
    with tempfile.TemporaryDirectory(prefix="mdt_jax-demo-") as folder:
        launch(args, folder).block_thread()


def launch(args: argparse.Namespace, folder: str):
    """Start the server; returns gradio's page. folder: for pictures. Raises UserError."""
    os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "served")
    try:
        from mdt_jax.demo import layout
    except ImportError as error:
        raise UserError(f"{error}; install gradio: pip install 'mdt_jax[demo]'") from None
    from mdt_jax.demo.handlers import Handlers
    from mdt_jax.demo.runs import Runs

    cli.start(args, keep_memory=True)
    runs = Runs(as_path(args.workdir)) if args.workdir else None
    handlers, title = None, args.checkpoint or args.workdir
    try:
        pipeline = Pipeline.from_flags({**vars(args), "checkpoint": title})
        pipeline.image_shape  # noqa: B018 (reads the VAE)
        handlers = Handlers(pipeline, folder)
    except UserError as error:
        if args.checkpoint:
            raise
        log(f"the page only follows the run: {error}")
    page = layout.build(title, handlers, runs)
    try:
        _, link, _ = page.launch(
            server_name="127.0.0.1", server_port=args.port or None, share=False, quiet=True,
            prevent_thread_lock=True, max_file_size=UPLOAD, css=layout.CSS, footer_links=[],
            enable_monitoring=False, ssr_mode=False, show_error=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port={args.port} cannot be used: {error}") from None
    print_result(f"the page is at {link}")
    return page


if __name__ == "__main__":
    cli.run(main)
