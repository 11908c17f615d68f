"""A server on 127.0.0.1 that answers as the Hugging Face hub does."""

import contextlib
import http.server
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

from tests.hub_protocol import Handler, Repository

COMMIT = "c" * 40  # of the repositories that a test begins with
TOKENS = {"hf_writer": ("someone", "write"), "hf_reader": ("someone", "read")}


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Any]:
    """The server. files: content by path /OWNER/REPOSITORY/resolve/main/FILE.

    It has `endpoint`, `requests` so far and `repositories`. Faults that may be set: `wrong_hash`,
    `hangs_up` in a download, `silent`, `cuts_uploads`, and `stalls_uploads` until `resumed` is set;
    `half_uploaded` is set once half of a large file has come.
    """
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.objects = [], {}
    server.tokens, server.organizations = dict(TOKENS), ["club", "your-name"]
    server.wrong_hash = server.hangs_up = server.silent = False
    server.cuts_uploads = server.stalls_uploads = False
    server.half_uploaded, server.resumed = threading.Event(), threading.Event()
    contents: dict[str, dict[str, bytes]] = {}
    for path, content in files.items():
        name, file = re.fullmatch("/([^/]+/[^/]+)/resolve/main/(.+)", path).groups()
        contents.setdefault(name, {})[file] = content
    server.repositories = {name: Repository(("someone",)) for name in contents}
    for name, repository in server.repositories.items():
        repository.commit(contents[name], oid=COMMIT)
    with running(server):
        yield server


@contextlib.contextmanager
def running(server: Any) -> Iterator[None]:
    """A server that answers in the background; sets its `endpoint`."""
    server.daemon_threads = True
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def use_here(server: Any, monkeypatch, cache: pathlib.Path, token: str = "hf_writer") -> None:
    """Make the client of this process ask the server."""
    from huggingface_hub import constants, file_download

    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": server.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    # Where older clients have it.
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setenv("HF_TOKEN", token)


@contextlib.contextmanager
def released(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """The environment in which the released weights' hf:// paths lead to small networks here, and
    uploads to hf://your-name/… are possible."""
    import jax

    from mdt_jax.models.autoencoder import AutoencoderKL
    from mdt_jax.models.mdt import MDT, init_params
    from mdt_jax.weights import kinds, networks

    files = {}
    for version in ("v1", "v2"):
        fields = {"hidden_size": 16, "depth": 4, "num_heads": 2, "version": version}
        model = MDT(input_size=(8, 8), in_channels=4, **fields)
        path = folder / f"mdt_xl2_{version}_ckpt.pt"
        networks.save(path, kinds.Weights(model, init_params(model, jax.random.key(0))))
        files[f"/shgao/MDT-XL2/resolve/main/{path.name}"] = path.read_bytes()
    vae = AutoencoderKL(channels=(32, 32), layers=1)
    images = jax.numpy.zeros((1, 4, 4, 3))
    params = jax.jit(vae.init)(jax.random.key(0), images)["params"]
    networks.save(folder / "vae.safetensors", kinds.Weights(vae, params))
    for decoder in ("mse", "ema"):
        name = f"sd-vae-ft-{decoder}/resolve/main/diffusion_pytorch_model.safetensors"
        files[f"/stabilityai/{name}"] = (folder / "vae.safetensors").read_bytes()
    with serve(files) as server:
        yield {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(folder / "cache"),
            "HF_TOKEN": "hf_writer",
            "HF_HUB_DISABLE_XET": "1",
        }
