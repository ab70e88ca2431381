"""A Hub on loopback: as much of its HTTP interface as pushing and loading a model uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackHub:
    """Holds repositories in memory: `repos[name][path]` is a file's bytes. Use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
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

    def sha(self, repo: str) -> str:
        content = b"".join(k.encode() + v for k, v in sorted(self.repos[repo].items()))
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
                {
                    "oid": o["oid"], "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{o['oid']}", "header": {}}},
                }
                for o in json.loads(body)["objects"]
            ]  # fmt: skip
            self._json({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").rpartition("/commit/")[0], body)
        else:
            self._json({"error": path}, 404)

    def _commit(self, repo: str, body: bytes) -> None:
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value)
            elif entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.blobs[value["oid"]]
        sha = self.hub.sha(repo)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._file(repo, rest.partition("/")[2])
        else:
            self._json({"error": path}, 404)

    do_HEAD = do_GET

    def _api(self, rest: str) -> None:
        repo, _, tree = rest.partition("/tree/")
        repo = repo.partition("/revision/")[0]
        if repo not in self.hub.repos:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.repos[repo]
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
        self._json({"id": repo, "sha": self.hub.sha(repo), "siblings": [{"rfilename": p} for p in files], "tags": []})

    def _file(self, repo: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            self._json({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": self.hub.sha(repo), "ETag": etag}
        if name.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self._raw(content, 200, headers)
