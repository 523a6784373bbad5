"""A server of ours that speaks the part of KServe's v2 protocol that a bundle's client uses."""

from __future__ import annotations

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Without its dependencies: it asks for an older ml-dtypes than onnx has here, and needs none of it.
_CLIENT = "pip install --no-deps tritonclient==2.73.0"
_TYPES = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32}
Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class TritonServer(http.server.ThreadingHTTPServer):
    """Answers what `run` says of the inputs; where classes are asked for, "name 0" and so on.

    Attributes:
        run: outputs by name for inputs by name.
        seen: of each request its path, and the names and shapes of its inputs.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.run = run
        self.seen: list[tuple[str, dict[str, list[int]]]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: TritonServer

    def do_POST(self) -> None:
        size = int(self.headers["Inference-Header-Content-Length"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body[:size])
        feeds, data = {}, body[size:]
        for given in request["inputs"]:
            part = given["parameters"]["binary_data_size"]
            array = np.frombuffer(data[:part], _TYPES[given["datatype"]])
            feeds[given["name"]] = array.reshape(given["shape"])
            data = data[part:]
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        self.server.seen.append((self.path, shapes))
        self._send(*self._answer(feeds, request.get("outputs")))

    def _answer(
        self, feeds: Mapping[str, np.ndarray], asked: list[Any] | None
    ) -> tuple[list[Any], bytes]:
        if asked is not None and "classification" in asked[0]["parameters"]:
            count, batch = asked[0]["parameters"]["classification"], len(feeds["images"])
            words = [f"{9 - i}.5:{i}:name {i}".encode() for i in range(count)] * batch
            data = b"".join(len(word).to_bytes(4, "little") + word for word in words)
            return [_output(asked[0]["name"], "BYTES", [batch, count], data)], data
        found = self.server.run(feeds)
        outputs, data = [], b""
        for name in found if asked is None else [one["name"] for one in asked]:
            kind = next(k for k, dtype in _TYPES.items() if dtype == found[name].dtype)
            part = found[name].tobytes()
            outputs.append(_output(name, kind, list(found[name].shape), part))
            data += part
        return outputs, data

    def _send(self, outputs: list[Any], data: bytes) -> None:
        head = json.dumps({"model_name": "model", "outputs": outputs}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(head + data)))
        self.send_header("Inference-Header-Content-Length", str(len(head)))
        self.end_headers()
        self.wfile.write(head + data)

    def log_message(self, *_: object) -> None:
        pass


def _output(name: str, kind: str, shape: list[int], data: bytes) -> dict[str, Any]:
    size = {"binary_data_size": len(data)}
    return {"name": name, "datatype": kind, "shape": shape, "parameters": size}


@contextmanager
def serving(run: Run) -> Iterator[TritonServer]:
    """A server, in a thread of this process."""
    server = TritonServer(run)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(bundle: Path, server: TritonServer, *arguments: object) -> list[str]:
    """The lines that a bundle's client prints; skips where NVIDIA's HTTP client is missing."""
    try:
        with_http = importlib.util.find_spec("tritonclient.http") is not None
        with_http &= importlib.util.find_spec("geventhttpclient") is not None
    except ModuleNotFoundError:
        with_http = False
    if not with_http:
        pytest.skip("Triton's HTTP client is not installed: pip install 'tritonclient[http]'")
    url = f"127.0.0.1:{server.server_port}"
    command = [sys.executable, str(bundle / "client.py"), *map(str, arguments), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def triton_schema() -> Any:
    """Triton's own model_config_pb2, without the rest of the package, which needs gRPC."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"Triton's schema is not installed: {_CLIENT}")
    path = Path(spec.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    loaded = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module
