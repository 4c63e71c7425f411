"""A hub on loopback with one repository, someone/model; it supports downloads and uploads."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = "someone/model"
API = f"/api/models/{REPOSITORY}"


@contextlib.contextmanager
def served(hub: type["Hub"]) -> Iterator[str]:
    """Serve a hub until the block ends; yields its endpoint."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of a hub.

    Attributes:
      files: folder with the files of the repository.
      requests: paths of the requests so far.
      hangs_up: whether each file is cut off in the middle.
      token: the token that an upload needs.
      others: API paths of other public repositories.
      stored: large files by SHA-256, before a commit names them.
      commits: the number of files that each commit adds and deletes.
    """

    files: Path
    requests: list[str]
    hangs_up = False
    token = "secret"
    others: tuple[str, ...] = ()
    stored: dict[str, bytes] = {}
    commits: list[tuple[int, int]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        listed = [file.relative_to(self.files).as_posix() for file in sorted(self.files.rglob("*")) if file.is_file()]
        name = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2]
        if path.startswith(f"{API}/tree/"):
            self.reply_json(
                [{"type": "file", "oid": "0" * 40, "size": (self.files / f).stat().st_size, "path": f} for f in listed]
            )
        elif path.startswith(API):
            info = {"id": REPOSITORY, "sha": "1" * 40, "siblings": [{"rfilename": file} for file in listed]}
            self.reply_json(info)
        elif path.startswith(f"/{REPOSITORY}/resolve/") and name in listed:
            self.reply((self.files / name).read_bytes(), name)
        elif path in self.others:
            self.reply_json({"id": path.split("/", 3)[3]})
        else:
            self.reply_json({"error": "Repository not found"}, 404, "RepoNotFound")

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(path)
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.reply_json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.reply_json({"url": f"http://{self.headers['Host']}/{REPOSITORY}"})
        elif path == "/api/validate-yaml":
            self.reply_json({"errors": [], "warnings": []})
        elif path == f"{API}/preupload/main":
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if "/d/" in file["path"] else "regular"}
                for file in json.loads(body)["files"]
            ]
            self.reply_json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            upload = f"http://{self.headers['Host']}/upload/"
            objects = [
                file | {"actions": {"upload": {"href": upload + file["oid"]}}} for file in json.loads(body)["objects"]
            ]
            self.reply_json({"transfer": "basic", "objects": objects})
        elif path == f"{API}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.reply_json(
                {"commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/1", "commitOid": "1" * 40}
            )
        else:
            self.send_error(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[hashlib.sha256(body).hexdigest()] = body
        self.reply(b"")

    def commit(self, lines: list[dict[str, Any]]) -> None:
        changes = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
        for kind, value in changes:
            path = self.files / value["path"]
            if kind == "deletedFile":
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                is_large = kind == "lfsFile"
                path.write_bytes(self.stored[value["oid"]] if is_large else base64.b64decode(value["content"]))
        deleted = sum(kind == "deletedFile" for kind, _ in changes)
        self.commits.append((len(changes) - deleted, deleted))

    def reply_json(self, value: Any, status: int = 200, error: str = "") -> None:
        self.reply(json.dumps(value).encode(), status=status, error=error)

    def reply(self, body: bytes, name: str = "", status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.hangs_up and name else body)

    def log_message(self, *arguments: Any) -> None:
        pass
