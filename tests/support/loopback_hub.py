"""A Hub on loopback: as much of its HTTP interface as pushing and loading a model uses."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class LoopbackHub:
    """Holds repositories in memory: `repos[name][path]` is a file's bytes on main. Use as a context manager.

    `branches[name][revision]` holds other revisions, pull requests under "refs/pr/N"; `private` the names of private
    repositories; `puts` the large files in the order in which they arrived. The next `drop` uploads of large files end
    with a closed connection.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.drop = 0
        self.commits: list[dict[str, Any]] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision: main, a branch, a pull request, or a commit of one of those."""
        known = {"main": self.repos.get(repo), **self.branches.get(repo, {})}
        if revision in known:
            return known[revision]
        return next((files for files in known.values() if files is not None and self.sha(files) == revision), None)

    def sha(self, files: dict[str, bytes]) -> str:
        content = b"".join(k.encode() + v for k, v in sorted(files.items()))
        return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._raw(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _raw(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self._body()
        if path == "/api/repos/create":
            data = json.loads(body)
            name = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
            name = name if "/" in name else f"someone/{name}"
            if name not in self.hub.repos and (data.get("private") or data.get("visibility") == "private"):
                self.hub.private.add(name)
            self.hub.repos.setdefault(name, {})
            self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": f["path"], "shouldIgnore": False, "oid": None,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"]} | self._upload(o["oid"]) for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})
        elif "/commit/" in path:
            repo, _, revision = path.removeprefix("/api/models/").partition("/commit/")
            self._commit(repo, unquote(revision), body)
        elif "/branch/" in path:
            repo, _, name = path.removeprefix("/api/models/").partition("/branch/")
            self.hub.branches.setdefault(repo, {}).setdefault(unquote(name), dict(self.hub.repos[repo]))
            self._json({})
        else:
            self._json({"error": path}, 404)

    def _upload(self, oid: str) -> dict[str, Any]:
        """Where a large file goes; nowhere if it is here already."""
        href = f"{self.hub.endpoint}/upload/{oid}"
        return {} if oid in self.hub.blobs else {"actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        answer: dict[str, Any] = {"success": True}
        files = self.hub.files(repo, revision)
        if files is None:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "RevisionNotFound"})
            return
        if "create_pr=1" in self.path:
            pulls = self.hub.branches.setdefault(repo, {})
            revision = f"refs/pr/{len(pulls) + 1}"
            files = pulls[revision] = dict(files)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{len(pulls)}"
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value)
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.sha(files)
        self._json(answer | {"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"})

    def do_PUT(self) -> None:
        content = self._body()
        if self.hub.drop:
            self.hub.drop -= 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        oid = hashlib.sha256(content).hexdigest()
        self.hub.puts.append(oid)
        self.hub.blobs[oid] = content
        self._json({})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._file(repo, unquote(revision), name)
        else:
            self._json({"error": path}, 404)

    do_HEAD = do_GET

    def _api(self, rest: str) -> None:
        repo, _, tree = rest.partition("/tree/")
        repo, _, revision = repo.partition("/revision/")
        if repo not in self.hub.repos:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.files(repo, unquote(tree.partition("/")[0] or revision or "main"))
        if files is None:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "RevisionNotFound"})
            return
        if tree:
            wanted = tree.partition("/")[2]
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
                if p.startswith(wanted)
            ]
            self._json(
                listed, 200 if listed or not wanted else 404, **({} if listed else {"X-Error-Code": "EntryNotFound"})
            )
            return
        answer = {"id": repo, "sha": self.hub.sha(files), "siblings": [{"rfilename": p} for p in files], "tags": []}
        self._json(answer | {"private": repo in self.hub.private})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if repo not in self.hub.repos:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.files(repo, revision)
        content = None if files is None else files.get(name)
        if content is None:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": self.hub.sha(files or {}), "ETag": etag}
        if name.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self._raw(content, 200, headers)
