"""A stand-in for the Hugging Face hub on this machine, which speaks what its real client asks for.

It keeps repositories in memory: branches of commits of files. Large files (`*.safetensors`) come through the LFS
protocol, their checksums are compared; everything else comes within the commit. `faults` make it fail as the hub does.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one may write, the other only read."""
CUT = -1
"""As a fault: the connection ends in the middle of the request."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        number = hashlib.sha1(repr((branch, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[number] = files
        self.branches[branch] = number
        self.messages.append(message)
        return number

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def has(self, revision: str) -> bool:
        return revision in self.branches or revision in self.commits


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[tuple[str, str], int] = {}
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository that is there already."""
        found = self.repositories[name] = Repository(private)
        found.commit("main", {".gitattributes": b"", **files}, "initial commit")
        return found

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((method, path))
        fault = next((code for (verb, part), code in self.server.faults.items() if verb == method and part in path), 0)
        if fault == CUT:
            if method in ("POST", "PUT"):
                self.rfile.read(10)
            self.close_connection = True
            return self.connection.close()
        body = self.body()
        if fault:
            return self.send({"error": "a fault on purpose"}, fault)
        return self.route(method, path, body)

    def route(self, method: str, path: str, body: bytes) -> None:
        if method == "PUT" and path.startswith("/lfs/"):
            return self.take_blob(path.removeprefix("/lfs/"), body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER, ""):
            return self.send({"error": "Invalid credentials"}, 401,
                             {"X-Error-Message": "Invalid credentials in Authorization header"})  # fmt: skip
        if path == "/api/validate-yaml":
            return self.validate_card(json.loads(body)["content"])
        if method == "POST" and token != WRITER:
            return self.send({"error": "You don't have the rights"}, 403)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        verb = "get_" if method in ("GET", "HEAD") else "post_"
        for pattern, handle in ROUTES.items():
            if (found := re.fullmatch(pattern, path)) and handle.__name__.startswith(verb):
                repository = self.server.repositories.get(found["repo"])
                if repository is None or (repository.private and not token):
                    return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return handle(self, repository, found, body)
        return self.send({"error": f"the stand-in does not know {method} {path}"}, 501)

    def create(self, given: dict[str, Any]) -> None:
        name = "/".join(part for part in (given.get("organization") or "me", given["name"]))
        if name in self.server.repositories:
            return self.send({"error": "You already created this model repo"}, 409)
        self.server.add(name, {}, given.get("visibility") == "private")
        return self.send({"url": f"{self.server.url}/{name}"})

    def validate_card(self, text: str) -> None:
        """As strict as the hub: the front matter is YAML, and names of models and data sets have the form of ids."""
        errors = []
        try:
            front = yaml.safe_load(text.split("---\n")[1])
        except (IndexError, yaml.YAMLError) as error:
            front, errors = {}, [{"message": f"no YAML: {error}"}]
        for key in ("base_model", "datasets"):
            for name in [front[key]] if isinstance(front.get(key), str) else front.get(key) or []:
                if not _HUB_ID.fullmatch(name):
                    errors.append({"message": f'"{key}" with value "{name}" is not valid'})
        for entry in front.get("model-index") or []:
            for result in entry["results"]:
                if not result["task"]["type"] or not result["dataset"]["type"] or not result["metrics"]:
                    errors.append({"message": '"model-index" is incomplete'})
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def get_info(self, repository: Repository, found: re.Match[str], body: bytes) -> None:
        revision = found["revision"] or "main"
        if not repository.has(revision):
            return self.send({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        commit = repository.branches.get(revision, revision)
        files = [{"rfilename": name} for name in repository.files(revision)]
        return self.send({"id": found["repo"], "modelId": found["repo"], "sha": commit, "private": repository.private,
                          "siblings": files})  # fmt: skip

    def post_branch(self, repository: Repository, found: re.Match[str], body: bytes) -> None:
        repository.branches[found["branch"]] = repository.branches["main"]
        self.send({})

    def post_preupload(self, repository: Repository, found: re.Match[str], body: bytes) -> None:
        there = repository.files(found["revision"])
        files = [
            {"path": entry["path"], "shouldIgnore": False, "uploadMode": _mode(entry["path"]),
             "oid": _oid(entry["path"], there[entry["path"]]) if entry["path"] in there else None}
            for entry in json.loads(body)["files"]
        ]  # fmt: skip
        self.send({"files": files})

    def post_lfs(self, repository: Repository, found: re.Match[str], body: bytes) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            href = {"href": f"{self.server.url}/lfs/{entry['oid']}"}
            new = {} if entry["oid"] in self.server.blobs else {"actions": {"upload": href}}
            objects.append({**entry, **new})
        self.send({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def take_blob(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send({"error": "wrong checksum"}, 400)
        self.server.blobs[oid] = body
        return self.send({})

    def post_commit(self, repository: Repository, found: re.Match[str], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        branch = found["revision"]
        if header.get("parentCommit") not in (None, repository.branches[branch]):
            return self.send({"error": "A commit has happened since"}, 412)
        files = dict(repository.files(branch))
        for line in lines[1:]:
            value = line["value"]
            lfs = line["key"] == "lfsFile"
            files[value["path"]] = self.server.blobs[value["oid"]] if lfs else base64.b64decode(value["content"])
        number = repository.commit(branch, files, header["summary"])
        return self.send({"success": True, "commitOid": number,
                          "commitUrl": f"{self.server.url}/{found['repo']}/commit/{number}"})  # fmt: skip

    def get_file(self, repository: Repository, found: re.Match[str], body: bytes) -> None:
        if not repository.has(found["revision"]):
            return self.send({}, 404, {"X-Error-Code": "RevisionNotFound"})
        commit = repository.branches.get(found["revision"], found["revision"])
        content = repository.commits[commit].get(found["file"])
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self.send({}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        return self.send_bytes(content, 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None,
             kind: str = "application/json") -> None:  # fmt: skip
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": kind, **(headers or {})})

    def send_bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(name: str) -> str:
    return "lfs" if name.endswith(".safetensors") else "regular"


def _oid(name: str, content: bytes) -> str:
    """What the client compares to see whether a file has changed: git's number, of a large file its sha256."""
    if _mode(name) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = {
    rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?": Handler.get_info,
    rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)": Handler.post_branch,
    rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)": Handler.post_preupload,
    rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)": Handler.post_commit,
    rf"/{_REPO}\.git/info/lfs/objects/batch": Handler.post_lfs,
    rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": Handler.get_file,
}
