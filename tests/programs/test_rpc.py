"""Layers on ggml-rpc servers, from the command line: rpc-server, --rpc, and what is said where that can not be."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import assert_error, command, run
from helpers.processes import environment, find_program, library_dir
from helpers.rpc import Connection, RpcServer, free_port

from llamamix import Model, ModelError, ModelParams, ParamsError, ProgramError, rpc

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs programs that signals end")

WARNING = "neither authentication nor encryption"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RpcServer]:
    with RpcServer(tmp_path / "log") as server:
        yield server
        assert server.is_running


GENERATE = ("-p", "the ants", "-n", "12", "--temp", "0", "-c", "256", "-t", "1", "--kv-mixed", "hot=32,cold=q4_0")


def test_generate_on_a_server(server: RpcServer, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = run(capsys, "generate", "-m", tiny_model_path, *GENERATE)
    assert expected[0] == 0 and expected[1]
    result = run(capsys, "generate", "-m", tiny_model_path, *GENERATE, "--rpc", server.endpoint)
    assert result == expected
    assert server.text().count("Accepted client connection") > 1  # it was asked


def test_bench_says_what_computes(server: RpcServer, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        "bench",
        "-m",
        tiny_model_path,
        "-p",
        "8",
        "-n",
        "4",
        "-r",
        "1",
        "-t",
        "1",
        "-o",
        "json",
        "--rpc",
        server.endpoint,
    )
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert {row["backends"] for row in json.loads(out)} == {"RPC"}


def test_eval_on_a_server(
    server: RpcServer, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was kept of another machine is not taken for it."""
    text = tmp_path / "text.txt"
    text.write_text("the ants and the man of the hill " * 200)
    args = (
        "eval", "-m", tiny_model_path, "-f", text, "-c", "256", "--n-decode", "8", "--leg", "decode", "-t", "1",
        "--kv-mixed", "hot=32,cold=q4_0", "--keep", tmp_path / "kept", "-o", "json",
    )  # fmt: skip
    results, n_kept = [], []
    for rpc in ((), ("--rpc", server.endpoint), ()):
        results.append(json.loads(run(capsys, *args, *rpc)[1]))
        n_kept.append(len(list((tmp_path / "kept").rglob("*.npz"))))
    assert 0 < 2 * n_kept[0] == n_kept[1] == n_kept[2]
    assert server.text().count("Accepted client connection") > 1
    assert [{row["backends"] for row in rows} for rows in results] == [{"CPU"}, {"RPC"}, {"CPU"}]
    measured = [[row["kld_mean"] for row in rows] for rows in results]
    assert measured[0] == measured[1] == measured[2] and measured[0][-1] > 0


def test_serve_on_a_server(server: RpcServer, tiny_model_path: Path) -> None:
    find_program("llama-server")
    args = command("serve", "-m", tiny_model_path, "--port", 0, "-c", 512, "-np", 1, "-t", 1, "--rpc", server.endpoint)
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        data = json.dumps({"prompt": "the ants", "n_predict": 8, "temperature": 0}).encode()
        request = urllib.request.Request(f"{url}/completion", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["tokens_predicted"] == 8
        with pytest.raises(TimeoutError), socket.create_connection(("127.0.0.1", server.port), 0.2) as other:
            other.sendall(b"\x0e" + (24).to_bytes(8, "little") + bytes(24))
            other.recv(1)  # llama-server has it
    finally:
        process.terminate()
        process.communicate()


def test_serve_goes_on_when_its_server_is_gone(tiny_model_path: Path, tmp_path: Path) -> None:
    """A request fails; llama-server answers others."""
    find_program("llama-server")
    with RpcServer(tmp_path / "log") as server:
        args = ("serve", "-m", tiny_model_path, "--port", 0, "-c", 512, "-np", 1, "-t", 1, "--rpc", server.endpoint)
        process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            data = json.dumps({"prompt": "the ants", "n_predict": 8, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/completion", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert json.load(reply)["tokens_predicted"] == 8
            server.kill()
            for _ in range(2):
                with pytest.raises(urllib.error.HTTPError, match="500"):
                    urllib.request.urlopen(request, timeout=60)
            with urllib.request.urlopen(f"{url}/health", timeout=60) as reply:
                assert reply.status == 200
        finally:
            process.terminate()
            process.communicate()


def test_rpc_server(tiny_model_path: Path, tmp_path: Path) -> None:
    find_program("ggml-rpc-server")
    port = free_port()
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command("rpc-server", "-p", port, "-t", 1, "-d", "CPU"), stdout=log, stderr=log, env=env
        )
    try:
        for _ in range(500):
            with contextlib.suppress(OSError), Connection(f"127.0.0.1:{port}"):
                break
            time.sleep(0.02)
        with Model(tiny_model_path, rpc=f"127.0.0.1:{port}") as model:
            assert model.n_layer == 2
    finally:
        process.terminate()
        process.wait()
    assert f"endpoint       : 127.0.0.1:{port}" in (tmp_path / "log").read_text()


#
# what is said
#


@pytest.mark.parametrize("program", ["rpc-server", "generate", "chat", "bench", "eval", "serve"])
def test_the_help_warns(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, program, "--help")
    assert code == 0 and WARNING in " ".join(out.split())


def test_a_server_for_others_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script stands in for ggml-rpc-server, so that nothing listens."""
    stand_in = tmp_path / "ggml-rpc-server"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    env = environment(LLAMAMIX_LIB_PATH=str(tmp_path))
    for host, warns in (("0.0.0.0", True), ("192.168.1.2", True), ("127.0.0.1", False), ("127.0.0.2", False)):
        result = subprocess.run(command("rpc-server", "-H", host, "-c"), capture_output=True, text=True, env=env)
        assert (result.returncode, result.stdout) == (0, f"-H {host} -p 50052 -c\n")
        assert (WARNING in result.stderr) == warns and (host in result.stderr) == warns


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-H", "localhost"), "-H must be an IPv4 address of this machine, not 'localhost'."),
        (("-p", "0"), "-p must be 1 to 65535, not 0."),
        (("-t", "0"), "-t must be 1 to 512, not 0."),
    ],
)
def test_rpc_server_refuses(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(run(capsys, "rpc-server", *args), 2, message)


def test_an_install_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMAMIX_LIB_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramError, match="this install was built without programs, or without RPC"):
        rpc.find_rpc_server()


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ("127.0.0.1:x", "must name servers as HOST:PORT"),
        ("127.0.0.1:0", "must name servers as HOST:PORT"),
        ("127.0.0.1:65536", "must name servers as HOST:PORT"),
        (":50052", "must name servers as HOST:PORT"),
        ("::1", "must name servers as HOST:PORT"),
        ("a,,b", "must name servers as HOST:PORT"),
        (["a", 1], "must be HOST:PORT, or several"),
        (7, "must be HOST:PORT, or several"),
        ("a,b:50052,a:50052", "names a server twice"),
        ([f"a:{i}" for i in range(1, 18)], "must not name more than 16"),
    ],
)
def test_names_that_are_none(servers: object, message: str) -> None:
    with pytest.raises(ParamsError, match=f"^rpc {message}"):
        ModelParams(rpc=servers)  # type: ignore[arg-type]


@pytest.mark.parametrize("servers", ["a, b:7", ["a", "b:7"], ("a:50052", "b:07")])
def test_names(servers: str | list[str]) -> None:
    assert ModelParams(rpc=servers).rpc == ("a:50052", "b:7")
    assert ModelParams().rpc == ()


@pytest.mark.parametrize("program", ["generate", "bench", "serve"])
def test_there_is_no_server(program: str, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find_program("llama-server")
    args = ["-p", "x"] if program == "generate" else []
    endpoint = f"127.0.0.1:{free_port()}"
    result = run(capsys, program, "-m", tiny_model_path, *args, "--rpc", endpoint)
    assert_error(result, 1, f"There is no RPC server at {endpoint}: Connection refused.")


def test_llama_server_without_its_server(tiny_model_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    args = [str(find_program("llama-server")), "-m", str(tiny_model_path), "--rpc", endpoint]
    result = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and f"there is no RPC server at {endpoint}" in result.stdout + result.stderr


def test_what_answers_is_something_else(tiny_model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ModelError, match=f"no RPC server of this version|no RPC server at {endpoint}"):
            Model(tiny_model_path, rpc=endpoint)
        thread.join()
