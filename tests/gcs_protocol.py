"""The protocol of Google Cloud Storage: gcp-storage-emulator, and what it leaves out.

Conditions on generations, the checks of resumable uploads, pages of listings, and faults that a
test asks for.
"""

import dataclasses
import http.server
import io
import json
import logging
import re
import socket
import struct
import sys
import threading
import time
import urllib.parse

from gcp_storage_emulator import exceptions, server, storage
from gcp_storage_emulator.handlers import objects

CHUNK = 256 << 10  # GCS takes all chunks of a resumable upload but the last in multiples of this
STATUS = re.compile(r"bytes \*/(\d+|\*)")
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
CONDITIONS = "ifGenerationMatch", "ifGenerationNotMatch"


@dataclasses.dataclass
class Fault:
    """What goes wrong in requests whose method and target match the regular expressions.

    The target is the path and the query, unquoted, and the name of the object that a request body
    names. status: answer this instead of 200. cut: close the connection "up", in the middle of the
    request's body, "down", in the middle of the answer's, or "answer", after the request was
    carried out and before its answer. wait: seconds before the answer. times: the number of
    requests; None for all. skip: the number of matching requests before the first fault.
    """

    method: str = ""
    target: str = ""
    status: int = 0
    cut: str = ""
    wait: float = 0.0
    times: int | None = None
    skip: int = 0

    def strikes(self, method: str, target: str) -> bool:
        """Whether this request has the fault, which is then counted."""
        if self.times == 0 or not re.match(self.method, method):
            return False
        if not re.search(self.target, target):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Refused(Exception):
    """A request that GCS refuses with this status."""


class Store(storage.Storage):
    """The emulator's store, in memory, with generations, conditions and resumable uploads."""

    def __init__(self):
        super().__init__(use_memory_fs=True, data_dir="/")
        self.lock = threading.Lock()
        self.condition = None  # of the request that is being served
        self.conditions = {}  # of each resumable upload
        self.finished = {}  # the object of each finished resumable upload

    def _write_config_to_file(self):  # it would write all names at each request
        pass

    def generation(self, bucket: str, name: str) -> str:
        """The generation of an object; "0" if there is none."""
        return self.objects.get(bucket, {}).get(name, {}).get("generation", "0")

    def create_bucket(self, bucket_name, bucket_obj):
        """As the emulator's, without copies of deleted objects."""
        bucket_obj["softDeletePolicy"] = {"retentionDurationSeconds": "0"}
        return super().create_bucket(bucket_name, bucket_obj)

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        """As the emulator's, if the generation is the one that the writer expects."""
        expected = self.conditions[file_id] if file_id else self.condition
        if expected not in (None, self.generation(bucket_name, file_name)):
            raise Refused(412)
        file_obj["etag"] = file_obj["generation"] = str(time.time_ns())
        super().create_file(bucket_name, file_name, content, file_obj, file_id)
        if file_id:
            self.finished[file_id] = file_obj

    def create_resumable_upload(self, bucket_name, file_name, file_obj):
        """As the emulator's; the condition counts when the upload ends."""
        file_id = super().create_resumable_upload(bucket_name, file_name, file_obj)
        self.conditions[file_id] = self.condition
        return file_id

    def add_to_resumable_upload(self, file_id, content, total_size=None, expected_start=None):
        """As the emulator's; bytes that were sent before are passed over, as GCS does."""
        known = self.get_resumable_byte_count(file_id)
        start = known if expected_start is None else expected_start
        if start > known:
            raise Refused(503)
        return super().add_to_resumable_upload(file_id, content[known - start :], total_size, known)


class Exchange:
    """One request, as the emulator's router reads it, and the answer that it writes."""

    def __init__(self, handler: http.server.BaseHTTPRequestHandler, body: bytes, store: Store):
        self.storage, self.server = store, handler.server
        self.path, self.headers = handler.path, handler.headers
        self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
        self.body, self.method = body, handler.command
        self.status, self.answer = 0, {}
        parts = urllib.parse.urlsplit(self.path)
        self.query = {key: v[0] for key, v in urllib.parse.parse_qs(parts.query).items()}
        found = re.search(r"/b/([^/]+)(?:/o(?:/([^/]+))?)?$", parts.path)
        bucket, name = found.groups() if found else (None, None)
        self.bucket, self.name = bucket, urllib.parse.unquote(name or "")

    def send_response(self, status: int, _: str = "") -> None:
        """Called by the emulator."""
        self.status = status

    def send_header(self, name: str, value: str) -> None:
        """Called by the emulator."""
        if name != "Content-Length":
            self.answer[name] = value

    def end_headers(self) -> None:
        """Called by the emulator."""

    def carry_out(self) -> bytes:
        """Let the emulator serve the request; returns the body of the answer."""
        self.storage.condition = self.query.get("ifGenerationMatch")
        try:
            self._check()
            if self.query.get("uploadType") in ("media", "multipart"):
                self._upload()
            else:
                server.Router(self).handle(self.method)
            body = self.wfile.getvalue()
        except Refused as error:
            self.status, self.answer, body = error.args[0], {}, b""
        except exceptions.Conflict:  # a wrong checksum
            self.status, self.answer, body = 400, {}, b""
        if self.status == 308 and not self._received():
            self.answer.pop("Range", None)
        if self.status == 200 and self.method == "GET" and self.query.get("alt") != "media":
            body = self._page(body)
        return body or self._error()

    def _check(self) -> None:
        """Raise Refused for what GCS refuses and the emulator does not."""
        generation = self.storage.generation(self.bucket or "", self.name)
        match, other = (self.query.get(name) for name in CONDITIONS)
        if self.name and generation != "0" and self.method in ("GET", "DELETE", "PATCH"):
            if match not in (None, generation):
                raise Refused(412)
            if other == generation:
                raise Refused(304)
        upload = self.query.get("upload_id")
        if upload and self.method == "DELETE":
            self.storage.resumable.pop(upload, None)
            raise Refused(499)
        if upload in self.storage.finished:
            self.method, self.path = "GET", f"/storage/v1{self._made(upload)}"
        elif upload is not None:
            self._check_chunk()
        if self.query.get("alt") == "media" and generation != "0":
            self._check_range()

    def _upload(self) -> None:
        """Write an object that is in one request, which the emulator cannot do for any bytes."""
        meta, content = {"name": self.query.get("name")}, self.body
        if self.query["uploadType"] == "multipart":
            meta, content = parts_of(self.body)
            meta = json.loads(meta)
        name, size = meta.pop("name"), str(len(content))
        if self.bucket not in self.storage.buckets:
            raise Refused(404)
        made = objects._make_object_resource("", self.bucket, name, None, size, meta)
        self.storage.create_file(self.bucket, name, content, objects._checksums(content, made))
        self.status, self.answer = 200, {"Content-type": "application/json"}
        self.wfile.write(json.dumps(made).encode())

    def _made(self, upload: str) -> str:
        made = self.storage.finished[upload]
        return f"/b/{made['bucket']}/o/{urllib.parse.quote(made['name'], safe='')}"

    def _check_chunk(self) -> None:
        sent = self.headers.get("Content-Range", "")
        if not sent or STATUS.fullmatch(sent):
            return
        found = RANGE.fullmatch(sent)
        if not found:
            raise Refused(400)
        start, end, total = found.groups()
        last = total != "*" and int(end) + 1 == int(total)
        size = int(end) + 1 - int(start)
        if size != len(self.body) or (not last and size % CHUNK):
            raise Refused(400)

    def _received(self) -> int:
        return self.storage.get_resumable_byte_count(self.query.get("upload_id", ""))

    def _check_range(self) -> None:
        size = int(self.storage.get_file_obj(self.bucket, self.name)["size"])
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found and found[1] and int(found[1]) >= size:
            raise Refused(416)
        if found and not found[1]:  # the last bytes
            del self.headers["Range"]
            self.headers["Range"] = f"bytes={max(size - int(found[2]), 0)}-"

    def _page(self, body: bytes) -> bytes:
        """A listing between startOffset and endOffset, in pages of maxResults objects."""
        if not self.bucket or self.name or not self.path.partition("?")[0].endswith("/o"):
            return body
        listing = json.loads(body)
        start, end = (self.query.get(name, "") for name in ("startOffset", "endOffset"))
        start = max(start, self.query.get("pageToken", ""))
        count = int(self.query.get("maxResults", 1000))
        items = [o for o in listing["items"] if o["name"] >= start]
        items = [o for o in items if not end or o["name"] < end]
        if len(items) > count:
            listing["nextPageToken"] = items[count]["name"]
        listing["items"] = items[:count]
        return json.dumps(listing).encode()

    def _error(self) -> bytes:
        """The JSON of an error, which the emulator leaves out."""
        if self.status < 400:
            return b""
        message = http.HTTPStatus(self.status).phrase if self.status != 499 else "Cancelled"
        if self.status == 404:
            known = self.bucket in self.storage.buckets
            message = f"No such object: {self.bucket}/{self.name}"
            message = message if known else "The specified bucket does not exist."
        self.answer["Content-type"] = "application/json"
        return error_json(self.status, message)


def parts_of(body: bytes) -> tuple[bytes, bytes]:
    """The two parts of a multipart body, without their headers.

    gcsfs ends lines with "\\n" alone, which the emulator does not tell from content.
    """
    boundary = re.match(rb"--[^\r\n]+(\r?\n)", body)
    if not boundary:
        raise Refused(400)
    end = boundary[1]
    _, meta, content, _ = (end + body).split(end + boundary[0].strip())
    return meta.partition(end + end)[2], content.partition(end + end)[2]


def error_json(status: int, message: str) -> bytes:
    """An error as GCS words it."""
    errors = [{"domain": "global", "reason": "test", "message": message}]
    error = {"code": status, "message": message, "errors": errors}
    return json.dumps({"error": error}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one connection. server.store, server.faults and server.requests belong to all."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body would be 40 ms apart

    def do_GET(self):
        """Serve a request of any method."""
        if urllib.parse.urlsplit(self.path).path in ("/faults", "/requests"):
            return self._control()
        size, chunked = (
            int(self.headers.get("Content-Length", 0)),
            self.headers["Transfer-Encoding"],
        )
        head = self._chunks() if chunked == "chunked" else self.rfile.read(min(size, 1 << 14))
        target = urllib.parse.unquote(self.path)
        media = "uploadType=media" in target
        if (
            self.command == "POST"
            and not media
            and (named := re.search(rb'"name":\s*"([^"]+)"', head))
        ):
            target += f" {named[1].decode()}"
        with self.server.store.lock:
            self.server.requests.append(f"{self.command} {target}")
            struck = [f for f in self.server.faults if f.strikes(self.command, target)]
        fault = struck[0] if struck else Fault()
        if fault.cut == "up":
            self.rfile.read(max(size // 2 - len(head), 0))
            return self._hang_up()
        body = head + self.rfile.read(max(size - len(head), 0))
        if len(body) < size:  # the client was killed
            return self._hang_up()
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(body))
        if fault.status:
            exchange, answer = None, error_json(fault.status, "a fault of the test")
        else:
            exchange = Exchange(self, body, self.server.store)
            with self.server.store.lock:
                answer = exchange.carry_out()
        time.sleep(fault.wait)
        if fault.cut == "answer":
            return self._hang_up()
        self._answer(fault.status, exchange, answer, fault.cut == "down")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _chunks(self) -> bytes:
        """The request's body, which comes in chunks."""
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_one_request(self):
        """As the library's; a connection that the client cuts ends quietly."""
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def _hang_up(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, exchange: Exchange | None, body: bytes, cut: bool) -> None:
        headers = {"Content-type": "application/json"}
        if exchange is not None:
            status, headers = exchange.status, exchange.answer
            generation = exchange.storage.generation(exchange.bucket or "", exchange.name)
            if exchange.name and generation != "0":
                headers |= {"x-goog-generation": generation, "ETag": generation}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self._hang_up()

    def _control(self) -> None:
        """POST /faults replaces the faults; GET /faults and /requests tell them."""
        if self.command == "POST":
            faults = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.server.store.lock:
                self.server.faults[:] = [Fault(**fault) for fault in faults]
                self.server.requests.clear()
        faults = [dataclasses.asdict(fault) for fault in self.server.faults]
        told = faults if self.path == "/faults" else self.server.requests
        self._answer(200, None, json.dumps(told).encode(), False)

    def log_message(self, *_):
        """Print nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A GCS in this process, on a free port."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        for name in ("api", "gcp_storage_emulator"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.store, self.faults, self.requests = Store(), [], []
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request, client_address):
        """Print nothing about a connection that ended."""
        if not isinstance(sys.exc_info()[1], OSError | exceptions.NotFound):
            super().handle_error(request, client_address)
