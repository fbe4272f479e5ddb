"""The server's web page in a real browser: it loads, sends a message, and shows the answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llamamix import Context, Model, SamplingParams, ServerError
from llamamix.server import Server, find_server

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

MESSAGE = "Name one colour."
N_PREDICT = 12


def test_a_message_gets_an_answer(smollm2_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium")
    try:
        server = Server(
            ["-m", str(smollm2_path), "--host", "127.0.0.1", "--port", "0", "-c", "2048", "-np", "1", "--temp", "0",
             "-n", str(N_PREDICT)],
            None,
        )  # fmt: skip
    except ServerError as error:
        pytest.skip(str(error))
    with server:
        url = server.wait_ready(300)
        if not server.has_page():
            pytest.skip("this llama-server has no web page: npm was not there when it was built")
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
            page = browser.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"{url}/")
            box = page.get_by_role("textbox").first
            box.fill(MESSAGE)
            box.press("Enter")
            with Model(smollm2_path) as model, Context(model, n_ctx=2048, kv_mixed=False) as context:
                messages, greedy = [{"role": "user", "content": MESSAGE}], SamplingParams(temperature=0.0)
                answer = "".join(context.chat(messages, max_tokens=N_PREDICT, sampling=greedy)).strip()
            page.get_by_text(answer).first.wait_for(timeout=120_000)
            assert MESSAGE in page.inner_text("body")
            browser.close()
        assert errors == []
