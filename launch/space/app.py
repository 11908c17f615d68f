"""The page as a Space of the Hugging Face hub, with the checkpoint that CHECKPOINT names."""

import os

from mdt_jax.demo.server import serve

if "CHECKPOINT" not in os.environ:
    raise SystemExit("set the variable CHECKPOINT, for example hf://OWNER/REPOSITORY/FILE")
serve(os.environ["CHECKPOINT"], host="0.0.0.0", vae=os.environ.get("VAE")).wait()
