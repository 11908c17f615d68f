"""The page's server, for the command, an app.py and notebooks."""

import contextlib
import os
import signal
import tempfile
import threading
from typing import TYPE_CHECKING

from mdt_jax.demo import layout
from mdt_jax.demo.handlers import Handlers
from mdt_jax.demo.runs import Runs
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import as_path
from mdt_jax.runtime.progress import log, print_result
from mdt_jax.sampling.pipeline import Pipeline

if TYPE_CHECKING:
    import gradio

# What a checkpoint is loaded with, flags of the commands, too.
LOADED = ("dtype", "vae", "vae_scale", "num_heads", "decoder_layers")
UPLOAD = "20mb"  # the largest picture


class Server:
    """A page that is served. link: its address; blocks: gradio's page."""

    def __init__(self, link: str, blocks: "gradio.Blocks", handlers: Handlers | None, close):
        self.link, self.blocks = link, blocks
        self._handlers, self._delete = handlers, close

    def wait(self) -> None:
        """Wait for Ctrl-C or SIGTERM, then close."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        self.close()

    def close(self) -> None:
        """Stop what is drawn, end the server and delete the pictures."""
        if self._handlers is not None:
            self._handlers.jobs.close()
        self.blocks.close(verbose=False)
        self._delete()


def serve(
    checkpoint: str | None = None,
    workdir: str | os.PathLike | None = None,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    **loaded: str | float | None,
) -> Server:
    """Start the page's server in a thread, and print its address; a notebook shows the page.

    checkpoint: as of `Pipeline.load`; None: that of the workdir. loaded: those of its arguments
    that LOADED names. workdir: a run to follow, or a folder of runs. port: 0 for a free one. host:
    the address that the server listens on; "0.0.0.0" is reached from other machines. Raises
    UserError, also where gradio is not installed.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port is {port}; ports are 0 to {2**16 - 1}")
    temporary = tempfile.TemporaryDirectory(prefix="mdt_jax-demo-")
    # gradio reads these when it is imported. No request leaves this machine.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = os.path.join(temporary.name, "served")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; install gradio: pip install 'mdt_jax[demo]'") from None

    runs = None if workdir is None else Runs(as_path(workdir), temporary.name)
    handlers, title = None, str(checkpoint or workdir or "")
    given = {name: value for name, value in loaded.items() if value is not None}
    if unknown := given.keys() - set(LOADED):
        raise TypeError(f"serve() got unexpected arguments: {', '.join(sorted(unknown))}")
    try:
        pipeline = Pipeline.from_flags({"checkpoint": title, **given})
        pipeline.image_shape  # noqa: B018 (reads the VAE)
        handlers = Handlers(pipeline, temporary.name, [f"--{n}={v}" for n, v in given.items()])
    except UserError as error:
        if checkpoint or runs is None:
            raise
        log(f"the page only follows the run: {error}")
    page = layout.build(title, handlers, runs)
    try:
        _, link, _ = page.launch(
            server_name=host, server_port=port or None, share=False, quiet=True,
            prevent_thread_lock=True, max_file_size=UPLOAD, css=layout.CSS, footer_links=[],
            enable_monitoring=False, ssr_mode=False, show_error=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used: {error}") from None
    print_result(f"the page is at {link}")
    return Server(link, page, handlers, temporary.cleanup)
