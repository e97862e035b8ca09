"""Runs on a page of this machine's own: listed anew at every look, filtered, compared, with their reports. It only reads, only below one folder, and only this machine sees it by default."""

from __future__ import annotations

import mimetypes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from duramen.problem import Problem
from duramen.report.overview import find_runs, overview, summarise

LOOPBACK = "127.0.0.1"
SHOWN = {".html", ".json", ".yaml", ".md", ".png", ".gif", ".mp4", ".svg", ".jsonl"}
"""What is given out; weights are not."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' data:; media-src 'self'"


def serve(root: Path, port: int = 8737, host: str = LOOPBACK) -> ThreadingHTTPServer:
    """A server of all runs below a folder, not yet running; ``serve_forever`` runs it.

    Args:
        root: The folder.
        port: 0 for any that is free.
        host: Who may look: this machine alone, or whoever reaches that address.

    Raises:
        Problem: If there is no such folder, or the port is taken.
    """
    if not root.is_dir():
        raise Problem(
            f"There is no folder {root}.", why="the runs below it are to be shown.", fix="the folder that holds OUT folders."
        )
    top = root.resolve()

    class Handler(BaseHTTPRequestHandler):
        """Answers GET."""

        def do_GET(self) -> None:
            """The list of runs, or a file below the folder."""
            name = self.headers.get("Host", "").rpartition(":")[0]
            if host == LOOPBACK and name not in ("localhost", LOOPBACK):  # a page elsewhere whose name was made to lead here
                self.send_error(403)
                return
            path = unquote(urlsplit(self.path).path).strip("/")
            if not path:
                self._give(page(top).encode(), "text/html; charset=utf-8")
                return
            file = (top / path).resolve()
            inside = (
                file.is_relative_to(top) and file.suffix in SHOWN and not any(part.startswith(".") for part in Path(path).parts)
            )
            if not inside or not file.is_file():
                self.send_error(404)
                return
            kind = mimetypes.guess_type(file.name)[0] or "text/plain; charset=utf-8"
            self._give(file.read_bytes(), "text/html; charset=utf-8" if file.suffix == ".html" else kind)

        def _give(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            for key, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(content))),
                ("Content-Security-Policy", POLICY),
                ("X-Content-Type-Options", "nosniff"),
            ):
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise Problem(
            f"Port {port} of {host} cannot be had: {error.strerror}.",
            why="another program has it.",
            fix="`--port 0` for any that is free.",
        ) from error


def page(root: Path) -> str:
    """The list of all runs below a folder."""
    lines = []
    for folder in find_runs(root):
        place = folder.relative_to(root).as_posix()
        lines.append(summarise(folder, place, "" if place == "." else place))
    return overview(f"Runs in {root.name}", lines)
