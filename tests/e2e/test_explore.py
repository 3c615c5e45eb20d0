"""The explorer: what the gateway tells it, and the page itself in a real browser."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from tolhouse.analysis.explain import explain_text
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import publish
from tolhouse.testing import Cluster, build_table, local_cluster, process, wait_until

from tests.commands import tolhouse

TEXT = "def add(x):\n    return"


def get(cluster: Cluster, path: str) -> httpx.Response:
    return httpx.get(f"http://{cluster.gateway}{path}", timeout=60)


def post(cluster: Cluster, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"http://{cluster.gateway}{path}", json=body, timeout=60)


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A model with a memory file beside its tokenizer, as the command writes it."""
    copy = tmp_path_factory.mktemp("explored") / "tiny-memory"
    shutil.copytree(checkpoint, copy)
    tolhouse(f"explain {copy} --explorer {copy}/memory.npz")
    return copy


@pytest.fixture(scope="module")
def cluster(explored: Path) -> Iterator[Cluster]:
    url = f"file://{explored.parent / 'tables'}"
    build_table(explored, url)
    with local_cluster(explored, url) as running:
        yield running


@pytest.fixture(scope="module")
def altered(explored: Path) -> Iterator[Cluster]:
    """The same model with a table that is compressed, edited and without a layer."""
    url = f"file://{explored.parent / 'altered'}"
    options = f"--store {url} --codec int8 --absent-layers 2"
    ref = tolhouse(f"compress {explored} {options}").stdout.strip()
    store = open_store(url)
    publish(store, ref)
    manifest = store.manifest(ref)
    nothing = np.zeros((1, manifest.num_blocks, manifest.width), np.float32)
    publish(store, make_overlay(store, ref, np.array([5], np.uint32), nothing).ref)
    with local_cluster(explored, url) as running:
        yield running


def test_a_browser_is_told_what_the_page_may_do(cluster: Cluster) -> None:
    """It runs its own script alone, calls this gateway alone, and is in no frame; nor is JSON."""
    page, data = get(cluster, "/explore"), get(cluster, "/explore/live")
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert ("'none'", "'none'", "'self'") == tuple(
        policy[name] for name in ("default-src", "frame-ancestors", "connect-src")
    )
    assert policy["script-src"].startswith("'sha256-")
    assert "frame-ancestors 'none'" in data.headers["content-security-policy"]
    for answer in (page, data, get(cluster, "/nothing")):
        assert "nosniff" == answer.headers["x-content-type-options"]
        assert "DENY" == answer.headers["x-frame-options"]


def test_tokens_are_told_as_explain_tells_them(cluster: Cluster, checkpoint: Path) -> None:
    """Norms, keys, who shares them, neighbours: to the precision of the file."""
    found = post(cluster, "/explore/tokens", text=TEXT).json()
    opened = open_checkpoint(checkpoint)
    tokenizer = opened.tokenizer()
    ids = [token["id"] for token in found["tokens"]]
    assert (4, tokenizer.encode(TEXT).ids) == (found["layers"], ids)
    expected = {entry["id"]: entry for entry in explain_text(opened, TEXT, 3, 5)}
    for short in found["tokens"]:
        entry = expected[short["id"]]
        np.testing.assert_allclose(entry["norms"], short["norms"], rtol=2e-3)
        token = get(cluster, f"/explore/tokens/{short['id']}").json()
        for layer, keys in zip(entry["keys"], token["keys"], strict=True):
            assert [k["key"] for k in layer] == [k["key"] for k in keys]
            for expected_key, key in zip(layer, keys, strict=True):
                assert expected_key["shared_by"] == [s["token"] for s in key["shared_by"]]
        cosines = [[n["cosine"] for n in e["nearest"]] for e in (entry, token)]
        np.testing.assert_allclose(*cosines, atol=2e-3)


@pytest.mark.parametrize("name", ["demo-memory", "demo-flex"])
def test_the_demo_models_have_theirs(name: str) -> None:
    """What is committed beside a checkpoint is of that checkpoint."""
    folder = Path("models") / name
    opened, arrays = open_checkpoint(folder), np.load(folder / "memory.npz")
    assert opened.model_id() == str(arrays["model_id"])
    assert opened.tokenizer_id == str(arrays["tokenizer_id"])


def test_live_counts_grow(cluster: Cluster) -> None:
    """By the tokens that were asked for, once the gateway has polled again."""
    before = get(cluster, "/explore/live").json()
    post(cluster, "/v1/completions", prompt=TEXT, max_tokens=7, ignore_eos=True)

    def grown() -> dict | None:
        now = get(cluster, "/explore/live").json()
        return now if now["tokens"] >= before["tokens"] + 7 else None

    after = wait_until(grown)
    assert re.fullmatch(r"tiny-memory@[0-9a-f]{16}", after["tables"][0])
    assert (1, []) == (after["workers"], after["absent_layers"])
    assert 0 < after["fetch_seconds"] / after["fetches"] < 60
    assert after["from_cache"] + after["from_remote"] > before["from_cache"] + before["from_remote"]


def test_whose_rows_they_are_is_told(cluster: Cluster, altered: Cluster, explored: Path) -> None:
    """The model's own, which those of a table need not be."""
    model = f"tiny-memory, {open_checkpoint(explored).model_id()[:12]}"
    own = f"Norms, keys and neighbours are of the model's own rows ({model})"
    assert f"{own}." == get(cluster, "/explore/live").json()["memory"]
    found = get(altered, "/explore/live").json()
    assert [2] == found["absent_layers"]
    differing = f"not of those of {found['tables'][0]} (int8, edited, without layer 2)"
    assert f"{own}, {differing}." == found["memory"]


def test_another_model_s_memory_is_hidden(cluster: Cluster, explored: Path, tmp_path: Path) -> None:
    """Though its tokenizer and shape fit: the page goes on without it; the log says it once."""
    other = shutil.copytree(explored, tmp_path / "other")
    arrays = dict(np.load(explored / "memory.npz"))
    np.savez_compressed(other / "memory.npz", **arrays | {"model_id": np.array("f" * 64)})
    served = f"the workers serve tiny-memory ({str(arrays['model_id'])[:12]})"
    expected = f"memory.npz is of model ffffffffffff, and {served}: write it again"
    options = ("--workers", cluster.workers, "--listen", "127.0.0.1:0", "--poll-seconds", "0.2")
    with process("gateway", str(other), *options) as gateway:
        here = Cluster("", "", gateway.address, [])
        wait_until(lambda: get(here, "/explore/live").json()["workers"])
        tokens = post(here, "/explore/tokens", text=TEXT).json()["tokens"]
        assert [{"id", "token"}] * 3 == [set(token) for token in tokens[:3]]
        answer = get(here, "/explore/tokens/5")
        assert 404 == answer.status_code
        assert expected in answer.json()["error"]["message"]
        assert expected in get(here, "/explore/live").json()["memory"]
        assert 1 == gateway.log.read_text(encoding="utf-8").count("the memory file is not shown")


def test_the_page_is_whole(cluster: Cluster) -> None:
    """Nothing of it lies elsewhere."""
    answer = get(cluster, "/explore")
    assert (200, "text/html; charset=utf-8") == (answer.status_code, answer.headers["content-type"])
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", answer.text)


@pytest.mark.parametrize("text", ["x" * 8_193, None, 5])
def test_bad_texts_are_refused(cluster: Cluster, text: object) -> None:
    """One that is too long, and what is no text."""
    assert 400 == post(cluster, "/explore/tokens", text=text).status_code


@pytest.mark.parametrize(
    ("token", "status"), [("512", 404), ("4294967296", 400), ("-1", 400), ("x", 400)]
)
def test_tokens_that_are_not_there_are_told(cluster: Cluster, token: str, status: int) -> None:
    """Outside the vocabulary, or no number."""
    answer = get(cluster, f"/explore/tokens/{token}")
    assert (status, True) == (answer.status_code, bool(answer.json()["error"]["message"]))


@pytest.mark.parametrize("without", ["norms", "model_id", ""])
def test_a_malformed_file_is_told(explored: Path, tmp_path: Path, without: str) -> None:
    """One that lacks something, or is no archive; at the gateway's start."""
    shutil.copytree(explored, tmp_path / "m")
    file = tmp_path / "m" / "memory.npz"
    arrays = {name: array for name, array in np.load(file).items() if name != without}
    np.savez_compressed(file, **arrays)
    if not without:
        file.write_bytes(b"no archive")
    done = tolhouse(f"gateway {tmp_path}/m --listen 127.0.0.1:0", code=1)
    assert "is not what `tolhouse explain --explorer` writes" in done.stderr


def test_a_memory_file_is_not_written_of_a_table(checkpoint: Path, tmp_path: Path) -> None:
    """Its keys would be the model's and its norms the table's: the options exclude each other."""
    done = tolhouse(f"explain {checkpoint} --explorer {tmp_path}/m.npz --table x", code=1)
    assert "without --table" in done.stderr
    assert [] == list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on the PATH")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(cluster: Cluster, browser: object) -> Iterator[object]:
    """The page in a Chromium that reaches nothing but the gateway."""
    opened = browser.new_page(viewport={"width": 1100, "height": 1400})
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: pytest.fail(str(error)))
    opened.goto(f"http://{cluster.gateway}/explore")
    yield opened
    assert all(url.startswith(f"http://{cluster.gateway}/") for url in asked)


SHOWN = "name => document.querySelector('#detail strong').innerText.trim() === name.trim()"


def is_of(request: object, path: str, text: str) -> bool:
    return request.url.endswith(path) and text in (request.post_data or "")


def wait_for(page: object, condition: str, arg: str | None = None) -> None:
    """Playwright's own wait evaluates texts in the page, which its policy forbids."""
    wait_until(lambda: page.evaluate(condition, arg), condition, 30)


def wait_for_status(page: object, text: str) -> None:
    wait_for(page, "text => document.getElementById('status').textContent === text", text)


def test_the_page_shows_tokens_and_follows_the_sliders(page: object) -> None:
    """Tokens with their keys, by mouse and keyboard; sliders change the right-hand text alone."""
    with page.expect_response(lambda answer: is_of(answer.request, "completions", "add(x)")):
        page.fill("#prompt", TEXT)
    wait_for(page, "document.querySelectorAll('#tokens button').length > 5")
    page.wait_for_selector("#original .dim")
    page.click("#tokens button:nth-child(1)")
    wait_for(page, "document.querySelectorAll('#detail tbody tr').length === 4")
    first = page.inner_text("#detail strong")
    page.keyboard.press("ArrowRight")
    another = "first => document.querySelector('#detail strong').innerText !== first"
    wait_for(page, another, first)
    neighbour = page.locator("#detail p .link").first
    name = neighbour.inner_text()
    neighbour.focus()
    page.keyboard.press("Enter")  # on to a neighbour, and from there to one that shares a key
    wait_for(page, SHOWN, name)
    sharer = page.locator("#detail tbody .link").last
    name = sharer.inner_text()
    sharer.click()
    wait_for(page, SHOWN, name)
    assert "true" == page.get_attribute("#tokens button:nth-child(2)", "aria-pressed")
    wait_for_status(page, "the same text")
    original = page.inner_text("#original")
    assert original == page.inner_text("#probed")
    page.locator("#row-scale").focus()
    page.keyboard.press("Home")
    wait_for_status(page, "another text")
    assert "-0.50" == page.inner_text("#row-scale-out")
    assert original == page.inner_text("#original") != page.inner_text("#probed")
    page.click("#reset")
    wait_for_status(page, "the same text")
    page.locator("#layers input").first.focus()
    page.keyboard.press("Home")
    assert ["0.00", "1.00", "1.00", "1.00"] == page.locator("#layers output").all_inner_texts()
    wait_for(page, "$('probed').textContent !== $('original').textContent")
    wait_for(page, "document.getElementById('live').textContent.includes('tiny-memory@')")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/explore.png", full_page=True)


def test_the_page_tells_errors(page: object) -> None:
    """A text that is too long is refused, and what was shown is gone; the page goes on."""
    page.wait_for_selector("#odds td")
    page.wait_for_selector("#tokens button")
    page.fill("#prompt", "word " * 3000)
    wait_for(page, "$('status').className === 'error'")
    both = "/context.*8192|8192.*context/.test($('status').textContent)"  # both say why
    wait_for(page, both)
    parts = ("original", "probed", "odds", "tokens")
    assert [""] * 4 == [page.inner_text(f"#{part}") for part in parts]
    assert "Choose a token" in page.inner_text("#detail")
    page.fill("#prompt", "def")
    wait_for(page, "$('status').textContent.endsWith('text')")
    assert "dim" == page.get_attribute("#status", "class")
    page.fill("#prompt", "")
    wait_for_status(page, "type a text")
    assert [""] * 3 == [page.inner_text(f"#{part}") for part in ("original", "probed", "odds")]


def test_the_page_tells_log_probabilities(page: object, cluster: Cluster) -> None:
    """Of each token, without and with the sliders, and where the two first differ."""
    body = {"prompt": TEXT, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    changes = ({}, {"row_scale": -0.5})
    answers = [post(cluster, "/v1/completions", **body | more).json() for more in changes]
    plain, probed = (answer["choices"][0]["logprobs"] for answer in answers)
    page.fill("#prompt", TEXT)
    page.click("#reset")
    page.fill("#row-scale", "-0.5")
    wait_for_status(page, "another text")
    columns = [page.locator(f"#odds td:nth-child({column})").all_inner_texts() for column in (3, 5)]
    expected = [[f"{p:.3f}" for p in side["token_logprobs"]] for side in (plain, probed)]
    assert expected == [[t for t in c if t] for c in columns]
    pairs = enumerate(zip(plain["tokens"], probed["tokens"], strict=False), 1)
    first = next(n for n, (a, b) in pairs if a != b)
    assert str(first) == page.inner_text("#odds tr.first td:first-child")
    assert 1 == page.inner_text("#odds").count("first difference")
    page.locator("#layers input").last.focus()
    page.keyboard.press("Tab")
    assert "odds" == page.evaluate("document.activeElement.id")
    page.click("#reset")


def test_an_older_answer_is_given_up(page: object) -> None:
    """Tokens of a text that was changed meanwhile are not waited for."""
    held = []

    def hold(route: object) -> None:
        if "older" in route.request.post_data:
            held.append(route)
        else:
            route.continue_()

    page.route("**/explore/tokens", hold)
    with page.expect_request(lambda request: is_of(request, "tokens", "older")):
        page.fill("#prompt", "older older older")
    with page.expect_event("requestfailed", lambda request: is_of(request, "tokens", "older")):
        page.fill("#prompt", "def")
    wait_for(page, "document.getElementById('tokens').textContent === 'def'")
    assert 1 == len(held)
    page.unroute("**/explore/tokens")


def test_rates_are_never_negative(page: object) -> None:
    """A worker that began anew has counted less than before: there is no rate then."""
    page.evaluate("before.tokens += 1e9")
    wait_for(page, "document.querySelector('#live dd').textContent === '…'")
    wait_for(page, "document.querySelector('#live dd').textContent === '0.0'")


def test_the_page_tells_what_a_table_lacks(altered: Cluster, browser: object) -> None:
    """A layer without rows can't be chosen, nor by a reset; whose rows are shown is said."""
    page = browser.new_page()
    page.goto(f"http://{altered.gateway}/explore")
    page.wait_for_selector("#layers input:disabled")
    page.click("#reset")
    state_of = "sliders => sliders.map(slider => [slider.disabled, slider.value])"
    states = page.eval_on_selector_all("#layers input", state_of)
    assert [[False, "1"], [False, "1"], [True, "0"], [False, "1"]] == states
    label = page.inner_text("#layers label:nth-child(3)")
    assert ["layer 2", "not in the table"] == label.split("\n")
    assert "(int8, edited, without layer 2)" in page.inner_text("#memory")
