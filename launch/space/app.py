"""The page as a Space of the Hugging Face hub, with the checkpoint that CHECKPOINT names."""

import os

from mdt_jax.demo.server import serve
from mdt_jax.runtime.errors import UserError

if "CHECKPOINT" not in os.environ:
    raise SystemExit("set the variable CHECKPOINT, for example hf://OWNER/REPOSITORY/FILE")
try:
    page = serve(os.environ["CHECKPOINT"], host="0.0.0.0", vae=os.environ.get("VAE"))
except UserError as error:
    raise SystemExit(f"error: {error}") from None
page.wait()
