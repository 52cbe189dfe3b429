"""A small Hugging Face Hub on loopback: as much of its interface as huggingface_hub needs for models.

Repositories hold whole commits, each a mapping of paths to bytes. Large files come through Git LFS, as they do to the
Hub from a client without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_owner"
LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """One model repository.

    Args:
        private: whether it can be read with the owner's token only.
        refs: commit of each branch and tag.
        commits: the files of each commit.
    """

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.refs:
            self.commit({}, "main")

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put the files on a branch as they are, as an upload would."""
        content = {**self.files(branch), **files}
        oid = hashlib.sha1(repr((len(self.commits), sorted(content.items()))).encode()).hexdigest()
        self.commits[oid] = content
        self.refs[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a hash."""
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision."""
        return self.commits.get(self.resolve(revision) or "", {})


class Hub:
    """The server; a context manager that runs it in a thread.

    Attributes:
        repositories: by name, to be looked at and changed by tests.
        requests: method and path of each request so far.
        break_off: a file whose download ends half-way.
        withheld: a file that nobody may read.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.break_off: str | None = None
        self.withheld: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    """An answer other than 200, with the code that tells the client what is wrong."""

    def __init__(self, status: int, code: str, **answer: Any) -> None:
        super().__init__(code)
        self.status, self.code, self.answer = status, code, answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    body: bytes

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, name: str, write: bool = False) -> Repository:
        """A repository, if it is there and the caller may see it; the Hub does not tell the one from the other."""
        found = self.hub.repositories.get(name)
        if found is None or ((write or found.private) and not self.is_owner):
            raise _Refused(404 if self.is_owner else 401, "RepoNotFound")
        return found

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            breaks_off = self.hub.break_off is not None and self.path.endswith(self.hub.break_off)
            self.wfile.write(content[: len(content) // 2] if breaks_off else content)
            self.close_connection = self.close_connection or breaks_off

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, function in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split():
                    answer = function(self, *map(unquote, found.groups()))
                    if answer is not None:
                        self.answer(json.dumps(answer).encode(), Content_Type="application/json")
                    return
            raise _Refused(501, f"This server does not know {self.command} {path}")
        except _Refused as refused:
            content = json.dumps({"error": refused.code, **refused.answer}).encode()
            self.answer(content, refused.status, X_Error_Code=refused.code, X_Error_Message=refused.code)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self) -> Any:
        request = self.json()
        if not self.is_owner:
            raise _Refused(401, "Invalid username or password.")
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if name in self.hub.repositories:
            raise _Refused(409, "You already created this model repo", url=f"{self.hub.endpoint}/{name}")
        self.hub.repositories[name] = Repository(private=request.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{name}"}

    def validate(self) -> Any:
        front_matter = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        base = (yaml.safe_load(front_matter[1]) if front_matter else {}).get("base_model")
        for name in base if isinstance(base, list) else [base] if base else []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                message = f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
                raise _Refused(400, "Invalid metadata", errors=[{"message": message}], warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str) -> Any:
        files, repository = self.json()["files"], self.repository(name, write=True)
        present = repository.files(revision)
        return {
            "files": [
                {
                    "path": (path := file["path"]),
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _etag(path, present[path]) if path in present else None,
                }
                for file in files
            ]
        }

    def batch(self, name: str) -> Any:
        objects = self.json()["objects"]
        self.repository(name, write=True)
        return {
            "transfer": "basic",
            "objects": [
                {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{item['oid']}"}}}
                for item in objects
            ],
        }

    def store(self, oid: str) -> None:
        content = self.body
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self.answer(b"")

    def commit(self, name: str, revision: str) -> Any:
        lines = [json.loads(line) for line in self.body.splitlines()]
        repository = self.repository(name, write=True)
        if repository.resolve(revision) is None:
            raise _Refused(404, "RevisionNotFound")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        opens_pull_request = "create_pr=1" in urlsplit(self.path).query
        if opens_pull_request:
            revision = "refs/pr/1"
            repository.refs[revision] = repository.refs["main"]
        oid = repository.commit(files, revision)
        return {
            "commitOid": oid,
            "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}",
            "pullRequestUrl": f"{self.hub.endpoint}/{name}/discussions/1" if opens_pull_request else None,
        }

    def branch(self, name: str, branch: str) -> Any:
        repository = self.repository(name, write=True)
        if branch.startswith("refs/"):
            raise _Refused(400, "Invalid reference for a branch")
        if branch in repository.refs:
            raise _Refused(409, "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        return {}

    def tag(self, name: str, revision: str) -> Any:
        tag, repository = self.json()["tag"], self.repository(name, write=True)
        repository.refs[tag] = repository.resolve(revision) or ""
        return {}

    def info(self, name: str, revision: str | None = None) -> Any:
        repository = self.repository(name)
        oid = repository.resolve(revision or "main")
        if oid is None:
            raise _Refused(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        return {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        oid = repository.resolve(revision)
        if oid is None:
            raise _Refused(404, "RevisionNotFound")
        if path == self.hub.withheld:
            raise _Refused(403, "Forbidden")
        content = repository.commits[oid].get(path)
        if content is None:
            # With the commit, by which the client's cache remembers what is not there.
            code = "EntryNotFound"
            self.answer(b"", 404, X_Error_Code=code, X_Error_Message=code, X_Repo_Commit=oid)
            return
        self.answer(content, ETag=f'"{_etag(path, content)}"', X_Repo_Commit=oid)


def _etag(path: str, content: bytes) -> str:
    """How Git names a file's content, or Git LFS a large file's."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/tag/([^/]+)", _Handler.tag),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
