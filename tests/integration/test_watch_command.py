"""`vlmtune watch`: the page over HTTP, from this machine and for it alone (SPEC H2)."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vlmtune.watch import HOST, server_of


@pytest.fixture
def run(tmp_path) -> Path:
    """A run in progress: what its folder holds after three steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "assignment.json").write_text("[]")
    lines = [{"kind": "train", "step": step, "loss": 3.0 / step, "seconds": float(step)} for step in range(1, 4)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def ask(run):
    """`ask(path, **headers)` -> (status, headers, body) of a server of that run."""
    with server_of(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.server_address[1]

        def get(path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict, str]:
            connection = http.client.HTTPConnection(HOST, port, timeout=10)
            connection.request(method, path, headers={"Host": f"localhost:{port}", **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()

        yield get
        server.shutdown()


def test_every_look_is_of_now(ask, run):
    status, headers, body = ask()
    assert status == 200 and headers["Cache-Control"] == "no-store" and "not finished" in body
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "finding", "step": 3, "level": "warn", "what": "it is late",
                               "evidence": "now", "remedy": ""}) + "\n")  # fmt: skip
    assert "it is late" not in body and "it is late" in ask("/report.html")[2]
    assert not (run / "report.html").exists(), "it only looks"


def test_it_refreshes_itself_while_the_run_goes_on_and_the_file_never_does(ask, run):
    body = ask()[2]
    (nonce,) = set(re.findall(r'<script nonce="([^"]+)">', body))
    assert f"script-src 'nonce-{nonce}'; connect-src 'self'" in body
    assert nonce not in ask()[2], "another one for every look"
    (run / "summary.json").write_text('{"steps": 3}')
    body = ask()[2]
    assert "<script" not in body and "script-src" not in body


def test_nothing_but_the_page_is_served(ask, run):
    (run.parent / "secret.txt").write_text("secret")
    (run / "config.yaml").write_text("model: here")
    for path in ("/config.yaml", "/../secret.txt", "/%2e%2e/secret.txt", "//etc/passwd", "/run/", "/.."):
        status, _, body = ask(path)
        assert status == 404 and "secret" not in body and "root:" not in body
    assert ask(method="POST")[0] == 501
    status, headers, body = ask(method="HEAD")
    assert status == 200 and body == "" and int(headers["Content-Length"]) > 1000


def test_a_page_elsewhere_cannot_read_it_under_another_name(ask):
    status, _, body = ask(Host="evil.example:8765")
    assert status == 403 and "not finished" not in body
    assert ask(Host=HOST)[0] == ask(Host=f"{HOST}:1234")[0] == 200


def test_a_damaged_file_is_named_in_the_browser(ask, run):
    (run / "start.json").write_text("[{")
    status, _, body = ask()
    assert status == 500 and "start.json is not JSON" in body and "Traceback" not in body


def test_the_stages_of_a_chain_have_pages(tmp_path, run):
    chain = tmp_path / "chain"
    chain.mkdir()
    run.rename(chain / "1_align")
    (chain / "stages.json").write_text(json.dumps([{"name": "align", "folder": "1_align"}]))
    with server_of(chain, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=10)
        for path, name in (("/", "chain"), ("/1_align/report.html", "1_align")):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200 and f"<h1>{name}</h1>" in answer.read().decode()
        server.shutdown()


def test_the_command_says_where_and_ends_with_ctrl_c(run):
    command = [sys.executable, "-m", "vlmtune", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background have it ignored
    )  # fmt: skip
    line = process.stdout.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ shows", line).group(1))
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "") and "not touched" in out


def test_what_cannot_be_shown_is_refused(run, tmp_path, vlmtune):
    code, _, err = vlmtune("watch", tmp_path / "nowhere")
    assert code == 1 and "is not a run folder" in err
    with server_of(run, 0) as server:
        code, _, err = vlmtune("watch", run, "--port", str(server.server_address[1]))
    assert code == 1 and "cannot be used" in err and "choose another one" in err
    (run / "summary.json").write_text("{")
    code, _, err = vlmtune("watch", run)
    assert code == 1 and "summary.json is not JSON" in err
