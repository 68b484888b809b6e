"""Test pushing a shared run to a hub, with a local server that answers like one."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_runs import make_config

import moe_bsr
from moe_bsr.config import ConfigError
from moe_bsr.runs.share import push, share

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    config = make_config(folder, train__steps=2, plan__moe_blocks=[], plan__drop_blocks=[])
    moe_bsr.train(config, folder / "run", callbacks=[])
    return folder / "run"


class Hub(BaseHTTPRequestHandler):
    """Answer the requests that an upload makes."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/me/photos", "name": "me/photos", "id": "1"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/me/photos/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {"warnings": [], "errors": []}
        self.answer(200, answer)

    def do_GET(self):
        self.answer(404, {"error": "nothing"})

    def answer(self, code: int, content: dict) -> None:
        raw = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


def test_a_shared_run_is_pushed_unchanged(plain, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.address = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    share(plain, tmp_path / "photos")
    try:
        assert push(tmp_path / "photos", "me/photos", private=True) == f"{server.address}/me/photos"
        with pytest.raises(ConfigError, match="no/such/name: could not be pushed"):
            push(tmp_path / "photos", "no/such/name")
    finally:
        server.shutdown()
        server.server_close()
    made = json.loads(next(body for path, body, _ in server.asked if path == "/api/repos/create"))
    assert made["name"] == "photos" and "private" in (
        made.get("visibility"),
        *[k for k, v in made.items() if v is True],
    )
    commit, token = next((body, token) for path, body, token in server.asked if "/commit/" in path)
    pushed = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in map(json.loads, commit.splitlines())
        if line["key"] == "file"
    }
    assert pushed == {file.name: file.read_bytes() for file in (tmp_path / "photos").iterdir()}
    assert token == "Bearer hf_test"
