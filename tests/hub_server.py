"""A server on 127.0.0.1 that answers as the Hugging Face hub does."""

import contextlib
import hashlib
import http.server
import pathlib
import threading
import time
from collections.abc import Iterator


class Handler(http.server.BaseHTTPRequestHandler):
    """server.files: content by path /OWNER/REPOSITORY/resolve/main/FILE; SHA-256 as the ETag."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.silent:
            time.sleep(60)
        content = self.server.files.get(self.path)
        if content is None:
            repository = "/".join(self.path.split("/")[:3])
            known = any(path.startswith(f"{repository}/") for path in self.server.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        digest = "0" * 64 if self.server.wrong_hash else hashlib.sha256(content).hexdigest()
        self.send_response(200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if self.server.hangs_up else content)
            self.close_connection = self.server.hangs_up

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[http.server.ThreadingHTTPServer]:
    """The server: `endpoint`, `requests` so far; `wrong_hash`, `hangs_up`, `silent` may be set."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests = files, []
    server.wrong_hash = server.hangs_up = server.silent = False
    server.daemon_threads = True
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def released(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """The environment in which the released weights' hf:// paths lead to small networks here."""
    import jax

    from mdt_jax.models.autoencoder import AutoencoderKL
    from mdt_jax.models.mdt import MDT, init_params
    from mdt_jax.weights import networks

    files = {}
    for version in ("v1", "v2"):
        fields = {"hidden_size": 16, "depth": 4, "num_heads": 2, "version": version}
        model = MDT(input_size=(8, 8), in_channels=4, **fields)
        path = folder / f"mdt_xl2_{version}_ckpt.pt"
        networks.save(path, networks.Weights(model, init_params(model, jax.random.key(0))))
        files[f"/shgao/MDT-XL2/resolve/main/{path.name}"] = path.read_bytes()
    vae = AutoencoderKL(channels=(32, 32), layers=1)
    images = jax.numpy.zeros((1, 4, 4, 3))
    params = jax.jit(vae.init)(jax.random.key(0), images)["params"]
    networks.save(folder / "vae.safetensors", networks.Weights(vae, params))
    for decoder in ("mse", "ema"):
        name = f"sd-vae-ft-{decoder}/resolve/main/diffusion_pytorch_model.safetensors"
        files[f"/stabilityai/{name}"] = (folder / "vae.safetensors").read_bytes()
    with serve(files) as server:
        yield {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "cache")}
