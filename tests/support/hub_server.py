"""A hub on this machine that speaks as much of Hugging Face's protocol as a download takes."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_secret"  # what opens the repository "closed/model"


class Hub:
    """Serves repositories, each a mapping of names to bytes; `asked` has what was asked for."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, *, body: bool) -> None:
                path = urlsplit(self.path).path
                hub.asked.append(f"{self.command} {path}")
                status, headers, data = self._found(path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def _found(self, path: str) -> tuple[int, dict[str, str], bytes]:
                parts = path.strip("/").split("/")
                listing = parts[:2] == ["api", "models"]
                parts = parts[2:] if listing else parts
                files = repositories.get("/".join(parts[:2]))
                opened = self.headers.get("Authorization") == f"Bearer {SECRET}"
                if files is None or (parts[0] == "closed" and not opened):
                    return 401, {"X-Error-Code": "RepoNotFound"}, b""
                if unquote(parts[3]) not in {"main", "refs/pr/1", COMMIT}:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b""
                if listing:
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": "0"}
                        for name, data in files.items()
                    ]
                    return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
                data = files.get("/".join(parts[4:]))
                if data is None:
                    return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
                tag = hashlib.sha256(data).hexdigest()
                return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}, data

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
