"""The explorer: what the gateway tells it, and the page itself in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from tolhouse.analysis.explain import explain_text
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.testing import Cluster, build_table, local_cluster

TEXT = "def add(x):\n    return"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    """A model with a memory file beside its tokenizer, as the command writes it."""
    folder = tmp_path_factory.mktemp("explored")
    copy = folder / "tiny-memory"
    shutil.copytree(checkpoint, copy)
    command = [sys.executable, "-m", "tolhouse.cli", "explain", str(copy), "--explorer", str(copy / "memory.npz")]
    subprocess.run(command, check=True, capture_output=True)
    url = f"file://{folder / 'tables'}"
    build_table(copy, url)
    with local_cluster(copy, url) as running:
        yield running


def test_tokens_are_told_as_explain_tells_them(cluster: Cluster, checkpoint: Path) -> None:
    """Norms, keys, who shares them, neighbours: to the precision of the file."""
    found = httpx.post(f"http://{cluster.gateway}/explore/tokens", json={"text": TEXT}).json()
    opened = open_checkpoint(checkpoint)
    assert (4, opened.tokenizer().encode(TEXT).ids) == (found["layers"], [t["id"] for t in found["tokens"]])
    expected = {entry["id"]: entry for entry in explain_text(opened, TEXT, 3, 5)}
    for token in found["tokens"]:
        entry = expected[token["id"]]
        np.testing.assert_allclose(entry["norms"], token["norms"], rtol=2e-3)
        token = httpx.get(f"http://{cluster.gateway}/explore/tokens/{token['id']}").json()
        assert [[k["key"] for k in layer] for layer in entry["keys"]] == [[k["key"] for k in layer] for layer in token["keys"]]
        for layer, told in zip(entry["keys"], token["keys"], strict=True):
            shared = [[opened.tokenizer().decode([s["id"]], skip_special_tokens=False) for s in k["shared_by"]] for k in told]
            assert [k["shared_by"] for k in layer] == shared
        np.testing.assert_allclose([n["cosine"] for n in entry["nearest"]], [n["cosine"] for n in token["nearest"]], atol=2e-3)


def test_live_counts_grow(cluster: Cluster) -> None:
    """By the tokens that were asked for, once the gateway has looked again."""
    url = f"http://{cluster.gateway}"
    before = httpx.get(f"{url}/explore/live").json()
    httpx.post(f"{url}/v1/completions", json={"prompt": TEXT, "max_tokens": 7, "ignore_eos": True})
    for _ in range(100):
        after = httpx.get(f"{url}/explore/live").json()
        if after["tokens"] >= before["tokens"] + 7:
            break
    assert re.fullmatch(r"tiny-memory@[0-9a-f]{16}", after["tables"][0])
    assert 0 < after["fetch_seconds"] / after["fetches"] < 60
    assert after["from_cache"] + after["from_remote"] > before["from_cache"] + before["from_remote"]


def test_the_page_is_whole(cluster: Cluster) -> None:
    """Nothing of it lies elsewhere."""
    answer = httpx.get(f"http://{cluster.gateway}/explore")
    assert (200, "text/html; charset=utf-8") == (answer.status_code, answer.headers["content-type"])
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", answer.text)


@pytest.mark.parametrize("text", ["x" * 8_193, None, 5])
def test_bad_texts_are_refused(cluster: Cluster, text: object) -> None:
    assert 400 == httpx.post(f"http://{cluster.gateway}/explore/tokens", json={"text": text}).status_code


@pytest.mark.parametrize(("token", "status"), [("512", 404), ("4294967296", 400), ("-1", 400), ("x", 400)])
def test_tokens_that_are_not_there_are_told(cluster: Cluster, token: str, status: int) -> None:
    answer = httpx.get(f"http://{cluster.gateway}/explore/tokens/{token}")
    assert (status, True) == (answer.status_code, bool(answer.json()["error"]["message"]))


def test_a_file_that_is_no_memory_is_told(checkpoint: Path, tmp_path: Path) -> None:
    """The gateway says so at its start."""
    shutil.copytree(checkpoint, tmp_path / "m")
    (tmp_path / "m" / "memory.npz").write_bytes(b"no archive")
    command = [sys.executable, "-m", "tolhouse.cli", "gateway", str(tmp_path / "m"), "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (1, True) == (done.returncode, "is not what `tolhouse explain --explorer` writes" in done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def page(cluster: Cluster) -> Iterator[object]:
    """The page in a Chromium that reaches nothing but the gateway."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1100, "height": 1400})
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: pytest.fail(str(error)))
        opened.goto(f"http://{cluster.gateway}/explore")
        yield opened
        assert all(url.startswith(f"http://{cluster.gateway}/") for url in asked)
        browser.close()


def test_the_page_shows_tokens_and_follows_the_sliders(page: object) -> None:
    """Tokens with their keys, by mouse and by keyboard; α and a layer change the right-hand text and not the left-hand one."""
    with page.expect_response(lambda answer: "add(x)" in (answer.request.post_data or "") and answer.url.endswith("completions")):
        page.fill("#prompt", TEXT)
    page.wait_for_function("document.querySelectorAll('#tokens button').length > 5 && document.querySelector('#original .dim')")
    page.click("#tokens button:nth-child(1)")
    page.wait_for_function("document.querySelectorAll('#detail tbody tr').length === 4")
    first = page.inner_text("#detail strong")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("first => document.querySelector('#detail strong').innerText !== first", arg=first)
    neighbour = page.locator("#detail p .link").first
    name = neighbour.inner_text()
    neighbour.focus()
    page.keyboard.press("Enter")  # on to a neighbour, and from there to one that shares a key
    page.wait_for_function("name => document.querySelector('#detail strong').innerText.trim() === name.trim()", arg=name)
    sharer = page.locator("#detail tbody .link").last
    name = sharer.inner_text()
    sharer.click()
    page.wait_for_function("name => document.querySelector('#detail strong').innerText.trim() === name.trim()", arg=name)
    assert "true" == page.get_attribute("#tokens button:nth-child(2)", "aria-pressed")
    page.wait_for_function("document.getElementById('status').textContent === 'the same text'")
    original = page.inner_text("#original")
    assert original == page.inner_text("#probed")
    page.locator("#alpha").focus()
    page.keyboard.press("Home")
    page.wait_for_function("document.getElementById('status').textContent === 'another text'")
    assert "-0.50" == page.inner_text("#alpha-out")
    assert original == page.inner_text("#original") != page.inner_text("#probed")
    page.click("#reset")
    page.wait_for_function("document.getElementById('status').textContent === 'the same text'")
    page.locator("#layers input").first.focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('probed').textContent !== document.getElementById('original').textContent")
    page.wait_for_function("document.getElementById('live').textContent.includes('tiny-memory@')")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/explore.png", full_page=True)


def test_the_page_tells_errors(page: object) -> None:
    """A text that is too long is refused by the worker, in words, and the page goes on."""
    page.fill("#prompt", "word " * 3000)
    page.wait_for_function("document.getElementById('status').className === 'error'")
    assert "context" in page.inner_text("#status")
    page.fill("#prompt", json.loads('"def"'))
    page.wait_for_function("document.getElementById('status').className !== 'error'")
