"""The Hugging Face hub on loopback, as far as huggingface_hub asks it: create, commit, download."""

import base64
import hashlib
import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from web_server import running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Attributes:
    repos: owner/name -> branch -> file -> content.
    commits: of every commit, the repository, branch and message.
    fails: a word in the path of requests that are answered with 500.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    fails: str = ""
    endpoint: str = ""
    large: dict[str, bytes] = field(default_factory=dict)

    def post(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Answers a POST: status, JSON."""
        if token != "hf_writer":
            return (403 if token else 401), {"error": "no"}
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repos:
                return 409, {"url": f"{self.endpoint}/{name}"}
            self.created.append(asked)
            self.repos[name] = {"main": {}}
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.endpoint}/large/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"objects": objects, "transfer": "basic"}
        name, kind, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if kind == "branch":
            new = branch not in self.repos[name]
            self.repos[name].setdefault(branch, dict(self.repos[name]["main"]))
            return (200 if new else 409), {}
        if kind == "preupload":
            files = json.loads(body)["files"]
            for file in files:
                is_large = file["path"].endswith((".safetensors", ".onnx", ".png"))
                file |= {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            return 200, {"files": files}
        assert kind == "commit"
        head, *changes = [json.loads(line) for line in body.splitlines()]
        for change in changes:
            value = change["value"]
            content = base64.b64decode(value["content"]) if "content" in value else None
            self.repos[name][branch][value["path"]] = content or self.large[value["oid"]]
        self.commits.append((name, branch, head["value"]["summary"]))
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    def get(self, path: str) -> tuple[str, bytes]:
        """Answers a GET: an error code of the hub or "", and the content."""
        owner, name, _, revision, *rest = [*path.strip("/").split("/"), "", "", ""]
        branches = self.repos.get(f"{owner}/{name}")
        if branches is None:
            return "RepoNotFound", b""
        files = branches["main"] if revision == COMMIT else branches.get(revision)
        if files is None:
            return "RevisionNotFound", b""
        content = files.get("/".join(rest).strip("/"))
        return ("EntryNotFound", b"") if content is None else ("", content)


@contextmanager
def serve(hub: Hub, folder: Path) -> Iterator[Hub]:
    """Runs the hub for the block, with its library's cache and token in a folder."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            code, content = hub.get(self.path)
            headers = {"X_Error_Code": code} if code else {}
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(404 if code else 200, content, X_Repo_Commit=COMMIT, ETag=etag, **headers)

        do_HEAD = do_GET

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def do_POST(self) -> None:
            body, token = self.body(), self.headers.get("Authorization", "")
            if hub.fails and hub.fails in self.path:
                self.answer(500, b"{}")
                return
            path = self.path.partition("?")[0]
            status, found = hub.post(path, token.removeprefix("Bearer "), body)
            self.answer(status, json.dumps(found).encode(), Content_Type="application/json")

        def do_PUT(self) -> None:
            content = self.body()
            hub.large[self.path.rpartition("/")[2]] = content
            self.answer(200, b"")

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with running(Handler) as hub.endpoint, pytest.MonkeyPatch.context() as patch:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.setenv("HF_TOKEN", "hf_writer")
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        huggingface_hub.utils.disable_progress_bars()
        yield hub
        huggingface_hub.close_session()
