"""Servers on 127.0.0.1 that speak the protocols of Google Cloud Storage and of S3.

`python -m tests.bucket_servers PORTFILE` serves GCS in a process of its own.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator

from tests.gcs_protocol import Fault, Server

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class GcsServer:
    """A running server, in this process or another, and one of its buckets.

    url: http://127.0.0.1:PORT.
    """

    url: str
    bucket: str = "bucket"
    numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def make_bucket(self) -> None:
        """Make a bucket that is empty and new to all clients, and remove all faults."""
        self.set_faults()
        self.bucket = f"bucket-{os.getpid()}-{next(self.numbers)}"
        self._request("POST", "/storage/v1/b?project=test", json.dumps({"name": self.bucket}))

    @property
    def root(self) -> str:
        """gs://BUCKET."""
        return f"gs://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that point all clients at the server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, google-cloud-storage
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # array_record
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # tensorstore
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # no questions about the kind of bucket
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "GOOGLE_CLOUD_PROJECT": "test",
            "CLOUDSDK_CONFIG": "/nonexistent",
            "NO_GCE_CHECK": "true",
        }

    def set_faults(self, *faults: Fault | dict) -> None:
        """Replace the faults, each a `Fault` or its fields, and forget the requests."""
        fields = [f if isinstance(f, dict) else dataclasses.asdict(f) for f in faults]
        self._request("POST", "/faults", json.dumps(fields))

    @property
    def faults(self) -> list[Fault]:
        """The faults, with the times that are left of them."""
        return [Fault(**fault) for fault in json.loads(self._request("GET", "/faults"))]

    @property
    def requests(self) -> list[str]:
        """The requests since set_faults, "METHOD TARGET"."""
        return json.loads(self._request("GET", "/requests"))

    def objects(self, prefix: str = "") -> list[str]:
        """The names of the bucket's objects that begin with `prefix`, sorted."""
        names, query = [], {"prefix": prefix}
        while True:
            path = f"/storage/v1/b/{self.bucket}/o?{urllib.parse.urlencode(query)}"
            listing = json.loads(self._request("GET", path))
            names += [item["name"] for item in listing["items"]]
            if "nextPageToken" not in listing:
                return names
            query["pageToken"] = listing["nextPageToken"]

    def read(self, name: str) -> bytes:
        """The content of an object."""
        return self._request("GET", f"{self._path(name)}?alt=media")

    def generation(self, name: str) -> str:
        """The generation of an object, another one each time that it is written."""
        return json.loads(self._request("GET", self._path(name)))["generation"]

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._request("POST", f"/upload/storage/v1/b/{self.bucket}/o?{query}", content)

    def remove(self, name: str) -> None:
        """Remove an object."""
        self._request("DELETE", self._path(name))

    def _path(self, name: str) -> str:
        return f"/storage/v1/b/{self.bucket}/o/{urllib.parse.quote(name, safe='')}"

    def _request(self, method: str, path: str, body: str | bytes | None = None) -> bytes:
        content = body.encode() if isinstance(body, str) else body
        headers = {"Content-Type": "application/json" if isinstance(body, str) else "text/plain"}
        request = urllib.request.Request(f"{self.url}{path}", content, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextlib.contextmanager
def serve_gcs() -> Iterator[GcsServer]:
    """A GCS with one empty bucket, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "port"
        command = [sys.executable, "-m", "tests.bucket_servers", str(path)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            while not path.exists():
                assert process.poll() is None, "the server did not start"
                time.sleep(0.02)
            gcs = GcsServer(f"http://127.0.0.1:{path.read_text()}")
            gcs.make_bucket()
            yield gcs
        finally:
            process.kill()
            process.wait()


@dataclasses.dataclass
class S3Server:
    """A running server of moto, and one of its buckets. url: http://127.0.0.1:PORT."""

    url: str
    bucket: str = "bucket"
    numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    @property
    def root(self) -> str:
        """s3://BUCKET."""
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that point all clients at the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> None:
        """Make a bucket that is empty and new to all clients."""
        self.bucket = f"bucket-{os.getpid()}-{next(self.numbers)}"
        self._client.create_bucket(Bucket=self.bucket)

    def objects(self, prefix: str = "") -> list[str]:
        """The names of the bucket's objects that begin with `prefix`, sorted."""
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.bucket, Prefix=prefix).build_full_result()
        return [item["Key"] for item in found.get("Contents", ())]

    def read(self, name: str) -> bytes:
        """The content of an object."""
        return self._client.get_object(Bucket=self.bucket, Key=name)["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        self._client.put_object(Bucket=self.bucket, Key=name, Body=content)

    @property
    def _client(self):
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client("s3", region_name="us-east-1", endpoint_url=self.url, **keys)


@contextlib.contextmanager
def serve_s3() -> Iterator[S3Server]:
    """An S3 with one empty bucket, in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        s3 = S3Server(f"http://{host}:{port}")
        s3.make_bucket()
        yield s3
    finally:
        moto.stop()


def main() -> None:
    """Serve GCS, and write the port to the file that the command line names."""
    gcs, path = Server(), pathlib.Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    path.with_suffix(".tmp").write_text(str(gcs.server_port))
    path.with_suffix(".tmp").rename(path)
    parent = os.getppid()
    threading.Thread(target=gcs.serve_forever, daemon=True).start()
    while os.getppid() == parent:
        time.sleep(1)


if __name__ == "__main__":
    main()
