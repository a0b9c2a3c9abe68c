"""A served model answers as the module does, refuses in sentences, and ends when it is told to."""

from __future__ import annotations

import importlib.util
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
from deploy_support import WEIGHT, build, manifest, pair_inputs, pair_module
from package_support import ROOT, clean_python

import tvm_sparse as ts
from tvm_sparse.deploy import wrap_executable
from tvm_sparse.model import TensorSpec
from tvm_sparse.runtime import CompiledModule


def _load_attack() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attack", ROOT / "benchmarks" / "attack.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attack"] = module
    spec.loader.exec_module(module)
    return module


attack = _load_attack()

LIMITS = ("--max-queue", "8", "--max-request-bytes", "200000", "--timeout", "3")
PATH = "/v2/models/relu/infer"


def relu_module() -> CompiledModule:
    """y = relu(x @ WEIGHT) for x (batch, 8)."""
    from tvm import relax, tirx

    def function(bb: object) -> None:
        batch = tirx.Var("batch", "int64")
        x = relax.Var("x", relax.TensorType((batch, 8), "float32"))
        with bb.function("main", [x]):
            with bb.dataflow():
                product = bb.emit(relax.op.matmul(x, relax.const(WEIGHT)))
                out = bb.emit_output(bb.emit(relax.op.nn.relu(product)))
            bb.emit_func_output(out)

    specs = TensorSpec("x", ("batch", 8), "float32"), TensorSpec("y", ("batch", 5), "float32")
    return wrap_executable(build(function), manifest((specs[0],), (specs[1],)))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    relu_module().export(folder / "relu.so")
    pair_module().export(folder / "pair.so")
    return folder


@pytest.fixture(scope="module")
def served(libraries: Path) -> Iterator[attack.Served]:
    with attack.Served(libraries / "relu.so", *LIMITS, "--max-size", "batch=1000") as server:
        yield server
        assert server.stop() == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.fixture(scope="module")
def target(served: attack.Served) -> attack.Target:
    return attack.Target(served.port, PATH, "x", 8)


@pytest.fixture(scope="module")
def client(served: attack.Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=120) as client:
        yield client


def random_rows(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)


def test_the_server_says_what_it_is_and_has(client: httpx.Client) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    wanted = {
        "name": "relu",
        "versions": ["1"],
        "platform": "tvm_sparse",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 5]}],
    }
    assert client.get("/v2/models/relu").json() == wanted
    assert client.get("/v2/models/relu/versions/1").json() == wanted
    assert client.get("/v2/models/relu/ready").json() == {"name": "relu", "ready": True}
    index = client.post("/v2/repository/index").json()
    assert [(each["name"], each["state"]) for each in index] == [("relu", "READY")]


def test_answers_in_json_and_in_binary_are_the_modules(
    client: httpx.Client, target: attack.Target, libraries: Path
) -> None:
    module = ts.load_module(libraries / "relu.so")
    for rows in (1, 3, 200):
        x = random_rows(rows, rows)
        wanted = module(x)
        answer = client.post(PATH, content=target.body(x, id="7"), headers=JSON).json()
        assert answer["id"] == "7" and answer["model_name"] == "relu"
        (output,) = answer["outputs"]
        assert output["shape"] == [rows, 5]
        assert np.array(output["data"], np.float32).tobytes() == wanted.tobytes()
        reply = target.ask(x)
        assert reply is not None and reply.status == 200
        assert attack.binary_outputs(reply) == [wanted.tobytes()]


JSON = {"Content-Type": "application/json; charset=utf-8"}


def test_a_version_may_be_named(client: httpx.Client, target: attack.Target) -> None:
    path = PATH.replace("/infer", "/versions/1/infer")
    assert client.post(path, content=target.body(random_rows(1)), headers=JSON).status_code == 200


def test_sizes_are_bounded(client: httpx.Client, target: attack.Target) -> None:
    reply = client.post(PATH, content=target.body(np.ones((1001, 8))), headers=JSON)
    assert reply.status_code == 400
    assert reply.json()["error"] == "'batch' is 1001, and this server takes 1000 at most"


def test_metrics_count_what_was_answered(client: httpx.Client, target: attack.Target) -> None:
    def count(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = count('tvm_sparse_requests_total{code="200"}'), count("tvm_sparse_run_seconds_count")
    for _ in range(3):
        assert target.ask(random_rows(2)).status == 200
    after = count('tvm_sparse_requests_total{code="200"}'), count("tvm_sparse_run_seconds_count")
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 3]
    assert count("tvm_sparse_requests_held") == 0


@pytest.mark.parametrize("name", attack.ATTACKS)
def test_an_attack_gets_a_sentence_and_the_next_client_its_answer(
    name: str, target: attack.Target
) -> None:
    chance = random.Random(name)
    for _ in range(10 if name in ("cut off", "noise", "changed bytes") else 1):
        attack.run_attack(name, target, chance)
    reply = target.ask(random_rows(2))
    assert reply is not None and reply.status == 200


def test_a_body_that_comes_slowly_is_not_waited_for(target: attack.Target) -> None:
    text = attack.request_text("POST", PATH, target.body(random_rows(1)))
    reply = attack.exchange(target.port, text[:-5])
    assert reply is not None and reply.status == 408
    assert reply.data["error"] == "the body did not arrive in 3 seconds"


@pytest.mark.parametrize("sent", [b"", b"POST /v2/models/relu/infer HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(target: attack.Target, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", target.port), timeout=60) as link:
        link.sendall(sent)
        try:
            assert link.recv(1) == b""
        except ConnectionResetError:
            pass


def test_an_answer_that_nobody_reads_is_thrown_away(target: attack.Target) -> None:
    many = "".join(
        f"GET /metrics HTTP/1.1\r\nHost: a\r\nX: {number}\r\n\r\n" for number in range(3000)
    )
    with socket.create_connection(("127.0.0.1", target.port), timeout=60) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        link.settimeout(60)
        with pytest.raises((ConnectionResetError, BrokenPipeError, TimeoutError)):
            for _ in range(100):
                link.sendall(many.encode())
                time.sleep(0.1)
    assert target.ask(random_rows(1)).status == 200


class Held:
    """Requests whose bodies do not end yet: they fill a server's queue."""

    def __init__(self, port: int, count: int) -> None:
        head = attack.request_text("POST", PATH, b"{" + b" " * 99)
        self.links = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        for link in self.links:
            link.sendall(head[:-50])

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links:
            link.close()


def test_a_full_queue_says_when_to_come_again(client: httpx.Client, target: attack.Target) -> None:
    with Held(target.port, 8):
        until = time.monotonic() + 60
        while (reply := target.ask(random_rows(1))).status == 200 and time.monotonic() < until:
            time.sleep(0.01)
        assert reply.status == 503 and reply.headers["retry-after"] == "1"
        assert reply.data["error"] == (
            "the server has 8 requests already, its --max-queue: try again"
        )
        # Probes and metrics are answered all the same.
        assert client.get("/v2/health/ready").status_code == 200
        assert "tvm_sparse_requests_held 8.0" in client.get("/metrics").text
    until = time.monotonic() + 60
    while target.ask(random_rows(1)).status != 200:
        assert time.monotonic() < until
        time.sleep(0.01)


def burst(target: attack.Target, requests: int) -> dict[int, int]:
    """Send many requests at once; return how often there was which answer."""
    statuses: dict[int, int] = {}
    lock = threading.Lock()

    def ask() -> None:
        reply = target.ask(random_rows(3))
        with lock:
            status = 0 if reply is None else reply.status
            statuses[status] = statuses.get(status, 0) + 1

    askers = [threading.Thread(target=ask) for _ in range(requests)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    return statuses


def test_more_requests_than_the_queue_holds_are_answered_or_sent_away(
    target: attack.Target, served: attack.Served
) -> None:
    before = served.resident_bytes
    statuses = burst(target, 1000)
    assert set(statuses) <= {200, 503} and statuses[200] >= 1
    assert served.resident_bytes - before < 100 << 20
    assert target.ask(random_rows(2)).status == 200


def test_requests_that_are_put_together_get_their_own_rows(libraries: Path) -> None:
    module = ts.load_module(libraries / "pair.so")
    options = ("--max-batch", "16", "--max-delay-ms", "5", "--name", "two")
    wrong: list[int] = []
    with attack.Served(libraries / "pair.so", *options) as server:
        url = f"http://127.0.0.1:{server.port}/v2/models/two/infer"

        def work(seed: int) -> None:
            with httpx.Client(timeout=120) as client:
                for number in range(10):
                    x, z = pair_inputs(1 + (seed + number) % 4, 100 * seed + number)
                    entries = [
                        {
                            "name": name,
                            "shape": list(array.shape),
                            "datatype": "FP32",
                            "data": array.tolist(),
                        }
                        for name, array in (("x", x), ("z/0", z))
                    ]
                    answer = client.post(url, json={"inputs": entries}).json()
                    for output, want in zip(answer["outputs"], module(x, z), strict=True):
                        got = np.array(output["data"], np.float32).reshape(output["shape"])
                        if not np.array_equal(got, want):
                            wrong.append(seed)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        metrics = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
        runs = float(metrics.split("tvm_sparse_run_rows_count ")[1].split()[0])
        assert runs < 80
        assert any("up to 16 rows; answers are bit for bit those" in line for line in server.lines)
        assert server.stop() == 0
    assert not wrong


def test_ending_answers_what_is_under_way(libraries: Path) -> None:
    # Requests wait for their batch for longer than the test takes: only the end gets them answered.
    options = ("--max-batch", "64", "--max-delay-ms", "60000", "--grace", "60")
    with attack.Served(libraries / "relu.so", *options) as server:
        target = attack.Target(server.port, PATH, "x", 8)
        replies: list[attack.Reply | None] = []
        askers = [
            threading.Thread(target=lambda: replies.append(target.ask(random_rows(2))))
            for _ in range(4)
        ]
        for asker in askers:
            asker.start()
        url = f"http://127.0.0.1:{server.port}/metrics"
        until = time.monotonic() + 60
        while "tvm_sparse_requests_held 4.0" not in httpx.get(url).text:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert server.stop() == 0
        for asker in askers:
            asker.join()
    assert [None if reply is None else reply.status for reply in replies] == [200] * 4


def test_workers_share_the_port_and_their_numbers(libraries: Path) -> None:
    with attack.Served(libraries / "relu.so", "--workers", "2") as server:
        target = attack.Target(server.port, PATH, "x", 8)
        for _ in range(20):
            assert target.ask(random_rows(1)).status == 200
        for _ in range(3):
            metrics = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
            assert 'tvm_sparse_requests_total{code="200"} 20.0' in metrics
        assert server.stop() == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_a_package_is_served_where_tvm_is_not_installed(libraries: Path, tmp_path: Path) -> None:
    ts.package(libraries / "relu.so", tmp_path / "dist")
    python = clean_python(tmp_path)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for name in SERVING_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue  # not every version of the others needs it
        origin = Path(spec.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (site / source.name).symlink_to(source)
    shutil.copytree(ROOT / "tvm_sparse", site / "tvm_sparse")
    check = [python, "-c", "import tvm_sparse, importlib.util as u; print(u.find_spec('tvm'))"]
    assert subprocess.run(check, capture_output=True, text=True).stdout == "None\n"
    with attack.Served(tmp_path / "dist", "--verify", "--name", "relu", python=python) as server:
        reply = attack.Target(server.port, PATH, "x", 8).ask(random_rows(3))
        wanted = ts.load_module(libraries / "relu.so")(random_rows(3))
        assert attack.binary_outputs(reply) == [wanted.tobytes()]
        assert server.stop() == 0


# What the extra `serve` brings, with what that needs.
SERVING_PACKAGES = (
    "starlette",
    "uvicorn",
    "h11",
    "click",
    "anyio",
    "idna",
    "sniffio",
    "exceptiongroup",
    "prometheus_client",
)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["missing.so"], "cannot read"),
        (["relu.so", "--host", "203.0.113.1"], "cannot listen at 203.0.113.1:8000"),
        (["relu.so", "--name", "a/b"], "choose one with --name"),
        (["relu.so", "--verify", "0" * 64], "was changed or is another file"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    libraries: Path, options: list[str], sentence: str
) -> None:
    command = [sys.executable, "-m", "tvm_sparse", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=libraries, timeout=120)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_a_model_of_tokens_is_not_put_together(tmp_path: Path) -> None:
    from tvm import relax, tirx

    def function(bb: object) -> None:
        tokens = tirx.Var("tokens", "int64")
        x = relax.Var("x", relax.TensorType((tokens, 4), "float32"))
        with bb.function("main", [x]):
            with bb.dataflow():
                out = bb.emit_output(bb.emit(relax.op.nn.softmax(x, axis=0)))
            bb.emit_func_output(out)

    specs = TensorSpec("x", ("tokens", 4), "float32"), TensorSpec("y", ("tokens", 4), "float32")
    library = tmp_path / "tokens.so"
    wrap_executable(build(function), manifest((specs[0],), (specs[1],))).export(library)
    command = [sys.executable, "-m", "tvm_sparse", "serve", str(library), "--max-batch", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the rows of the output 'y' depend on each other" in done.stderr


def test_only_its_own_address_is_listened_at(served: attack.Served) -> None:
    socket.create_connection(("127.0.0.1", served.port)).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", served.port), timeout=10)
