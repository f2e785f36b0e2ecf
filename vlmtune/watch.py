"""`vlmtune watch RUN`: the run page on localhost, made anew for every look; it refreshes itself during a run."""

from __future__ import annotations

import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console

from vlmtune.observe.html import render_html
from vlmtune.observe.page import Refresh, render_page
from vlmtune.sealed import stage_folders
from vlmtune.types import VlmtuneError

HOST = "127.0.0.1"  # nobody else's machine: the page shows data and file names
NAMES = {HOST, "localhost"}
SECONDS = 5.0  # between two refreshes


def watch(run: Path, port: int, console: Console) -> None:
    """Serve the page of a run, or of a chain and its stages, until Ctrl-C. port: 0 for any that is free.

    Raises VlmtuneError for a folder that is not a run, and a port that is taken.
    """
    with server_of(run, port) as server:
        console.print(f"http://{HOST}:{server.server_address[1]}/ shows {run}; Ctrl-C ends it", highlight=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("no longer shown; a run that is going on is not touched by this", highlight=False)


def server_of(run: Path, port: int) -> ThreadingHTTPServer:
    """What `watch` serves with, listening already."""
    if not (run / "assignment.json").is_file() and not (run / "stages.json").is_file():
        raise VlmtuneError(
            f"{run} is not a run folder: it has neither assignment.json nor stages.json; start the run first."
        )
    render_page(run)  # what is wrong with it is said here, not in a browser
    try:
        return PageServer(run, port)
    except OSError as error:
        raise VlmtuneError(
            f"--port {port} cannot be used ({error.strerror}); choose another one, or 0 for any."
        ) from error


class PageServer(ThreadingHTTPServer):
    """Knows which run it shows."""

    daemon_threads = True

    def __init__(self, run: Path, port: int):
        self.run = run
        super().__init__((HOST, port), PageHandler)


class PageHandler(BaseHTTPRequestHandler):
    """GET / and, of a chain, GET /<stage>/report.html. No path of a request is opened: it is looked up in a table."""

    server: PageServer
    server_version, sys_version = "vlmtune", ""

    def do_GET(self) -> None:
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if name not in NAMES:  # a page elsewhere whose name was pointed at this machine
            self._answer(HTTPStatus.FORBIDDEN, "This page is for the machine that it runs on.")
            return
        run = self._run()
        if run is None:
            self._answer(HTTPStatus.NOT_FOUND, "There is no such page here.")
            return
        try:
            refresh = None if (run / "summary.json").exists() else Refresh(SECONDS, secrets.token_urlsafe(16))
            self._send(HTTPStatus.OK, render_page(run, refresh))
        except VlmtuneError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    do_HEAD = do_GET

    def _run(self) -> Path | None:
        path = unquote(urlsplit(self.path).path)
        run = self.server.run
        stages = stage_folders(run) if (run / "stages.json").is_file() else []
        return {"/": run, "/report.html": run, **{f"/{stage.name}/report.html": stage for stage in stages}}.get(path)

    def _answer(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, render_html("sentence.html.jinja", title=status.phrase, sentence=sentence))

    def _send(self, status: HTTPStatus, html: str) -> None:
        body = html.encode("utf-8", errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """One line for every look would bury the rest of the terminal."""
