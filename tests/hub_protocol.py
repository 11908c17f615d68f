"""The Hugging Face hub's protocol: repositories, tokens and uploads, in memory."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import re
import time
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # what the hub stores as large files
NAME = re.compile(r"[A-Za-z0-9._-]{1,96}")
_numbers = itertools.count(1)


@dataclasses.dataclass
class Repository:
    """commits: files by name. refs: branch or tag → commit. members: users who may write."""

    members: tuple[str, ...] = ()
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main", oid: str = "") -> str:
        """Set the files of a branch; returns the commit."""
        oid = oid or hashlib.sha1(str(next(_numbers)).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def at(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        return revision if revision in self.commits else self.refs.get(revision)

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the branch main."""
        return self.commits[self.refs["main"]]


def etag(name: str, content: bytes) -> str:
    """SHA-256 of a large file, Git's hash of another."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    """An answer that is no success: status, the hub's error code, message."""


class Handler(http.server.BaseHTTPRequestHandler):
    """server.repositories, server.objects (large files by SHA-256), server.tokens: token →
    (user, role), server.organizations: of all users; and the faults that `serve` lists."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        """Send what a route returns: JSON, or the content of a file."""
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.silent:
            time.sleep(60)
        self.body = b""
        if self.command == "PUT":
            self.body = self.receive()
            if self.body is None:
                return
        elif length := int(self.headers.get("Content-Length") or 0):
            self.body = self.rfile.read(length)
        path = urlsplit(self.path).path
        try:
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return method(self, *map(unquote, match.groups()))
            raise Refused(404, "", "no such route")
        except Refused as refused:
            status, code, message = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
            if code == "EntryNotFound":
                headers["X-Repo-Commit"] = self.commit
            self.send(json.dumps({"error": message}).encode(), status, **headers)

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: object, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, **{"Content-Type": "application/json"})

    def receive(self) -> bytes | None:
        """The body of an upload; None where a fault cuts it."""
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length // 2)
        self.server.half_uploaded.set()
        if self.server.cuts_uploads:
            self.close_connection = True
            return None
        if self.server.stalls_uploads:
            self.server.resumed.wait(60)
        return body + self.rfile.read(length - len(body))

    # --- Who asks

    def user(self) -> tuple[str, str]:
        """(name, role) of the token; ("", "") without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.server.tokens[token] if token else ("", "")

    def repository(self, name: str, write: bool = False) -> Repository:
        user, role = self.user()
        found = self.server.repositories.get(name)
        if found is None or (found.private and user not in found.members):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (role == "write" and user in found.members):
            raise Refused(403, "", f"You do not have write access to {name}")
        return found

    # --- Reading

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.repository(name)
        user, _ = self.user()
        if repository.gated and user not in repository.members:
            raise Refused(403 if user else 401, "GatedRepo", f"Access to {name} is restricted")
        self.commit = repository.at(revision)
        if self.commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[self.commit].get(file)
        if content is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        digest = "0" * 64 if self.server.wrong_hash else etag(file, content)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.commit}
        if self.server.hangs_up and self.command == "GET":
            headers["Content-Length"] = str(len(content))
            self.close_connection = True
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return
        self.send(content, **headers)

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": file} for file in sorted(repository.commits[commit])]
        self.json({
            "id": name, "modelId": name, "sha": commit, "siblings": files, "tags": [],
            "private": repository.private, "gated": "manual" if repository.gated else False,
        })  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit].items()
        self.json([
            {"type": "file", "path": file, "size": len(content), "oid": etag(file, content)}
            for file, content in sorted(files)
        ])  # fmt: skip

    def whoami(self) -> None:
        user, role = self.user()
        if not user:
            raise Refused(401, "", "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"role": role}}
        self.json({"type": "user", "name": user, "orgs": [], "auth": auth})

    # --- Writing

    def create(self) -> None:
        asked, (user, role) = json.loads(self.body), self.user()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        url = f"{self.server.endpoint}/{name}"
        if not user:
            raise Refused(401, "", "Invalid username or password.")
        if owner not in (user, *self.server.organizations):
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise Refused(403, "", message)
        if role != "write":
            raise Refused(403, "", "You must use a token with the write permission")
        if not NAME.fullmatch(asked["name"]):
            raise Refused(400, "", f"Invalid repository name {asked['name']}")
        if name in self.server.repositories:
            return self.json({"url": url, "error": "You already created this model repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = Repository((user,), bool(private))
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[name] = repository
        self.json({"url": url})

    def branch(self, name: str, ref: str) -> None:
        repository = self.repository(name, write=True)
        if ref in repository.refs:
            raise Refused(409, "", "Reference already exists")
        repository.refs[ref] = repository.refs["main"]
        self.json({})

    def validate_yaml(self) -> None:
        import yaml

        match = re.match("---\n(.*?)\n---\n", json.loads(self.body)["content"], re.S)
        try:
            assert match and isinstance(yaml.safe_load(match[1]), dict)
        except (AssertionError, yaml.YAMLError) as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        self.json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository.at(revision) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.json({"files": files})

    def batch(self, name: str) -> None:
        self.repository(name, write=True)
        asked = json.loads(self.body)
        assert asked["operation"] == "upload" and "basic" in asked["transfers"]
        objects = []
        for each in asked["objects"]:
            if each["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/objects/{each['oid']}"
                each = {**each, "actions": {"upload": {"href": href}}}
            objects.append(each)
        self.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "The content does not have this SHA-256")
        self.server.objects[oid] = self.body
        self.send(b"")

    def commit_files(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repository.commits[commit])
        for line in self.body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                with contextlib.suppress(KeyError):
                    files[value["path"]] = self.server.objects[value["oid"]]
                    continue
                raise Refused(400, "", f"{value['path']} was not uploaded")
            elif key != "header":
                raise Refused(400, "", f"{key} is not supported")
        oid = repository.commit(files, revision)
        url = f"{self.server.endpoint}/{name}/commit/{oid}"
        self.json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


_REPO = "([^/]+/[^/]+)"
ROUTES = [
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
    (rf"GET /api/models/{_REPO}", Handler.info),
    (rf"GET /api/models/{_REPO}/revision/([^/]+)", Handler.info),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", Handler.tree),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{_REPO}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /objects/([0-9a-f]{64})", Handler.put),
    (rf"POST /api/models/{_REPO}/commit/([^/]+)", Handler.commit_files),
]
