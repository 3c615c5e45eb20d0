"""The explorer: the gateway's data for it, and the page itself in a headless Chromium."""

import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect
from tolhouse.analysis.explain import explain_text
from tolhouse.gateway.auth import add_key
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import publish
from tolhouse.testing import (
    Cluster,
    build_table,
    local_cluster,
    process,
    tiny_model,
    wait_until,
)

from tests import browser as chromium
from tests.commands import HTTP, tolhouse

TEXT = "def add(x):\n    return"


def get(cluster: Cluster, path: str) -> httpx.Response:
    return HTTP.get(f"http://{cluster.gateway}{path}", timeout=60)


def post(cluster: Cluster, path: str, **body: object) -> httpx.Response:
    return HTTP.post(f"http://{cluster.gateway}{path}", json=body, timeout=60)


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


def test_the_policy_of_the_page(cluster: Cluster) -> None:
    """The page runs its own scripts only, calls its gateway only, and no frame may hold it."""
    page, data = get(cluster, "/explore"), get(cluster, "/explore/live")
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert ("'none'", "'none'", "'self'") == tuple(
        policy[name] for name in ("default-src", "frame-ancestors", "connect-src")
    )
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"('sha256-[\w+/]+=*' ?)+", policy[name])
    assert "frame-ancestors 'none'" in data.headers["content-security-policy"]
    for answer in (page, data, get(cluster, "/nothing")):
        assert "nosniff" == answer.headers["x-content-type-options"]
        assert "DENY" == answer.headers["x-frame-options"]


def test_tokens_have_the_values_of_explain(cluster: Cluster, explored: Path) -> None:
    """Norms, keys, their tokens and nearest tokens equal `tolhouse explain`, in half precision."""
    found = post(cluster, "/explore/tokens", text=TEXT).json()
    opened = open_checkpoint(explored)
    tokenizer = opened.tokenizer()
    ids = [token["id"] for token in found["tokens"]]
    assert (4, tokenizer.encode(TEXT).ids) == (found["layers"], ids)
    expected = {entry["id"]: entry for entry in explain_text(opened, TEXT, 3, 5)}
    opened_norms = np.load(explored / "memory.npz")["norms"]
    for short in found["tokens"]:
        entry = expected[short["id"]]
        np.testing.assert_allclose(entry["norms"], short["norms"], rtol=2e-3)
        token = get(cluster, f"/explore/tokens/{short['id']}").json()
        smaller = (opened_norms < opened_norms[short["id"]]).mean(axis=0)
        np.testing.assert_allclose(100 * smaller, token["percentiles"], atol=0.06)
        for layer, keys in zip(entry["keys"], token["keys"], strict=True):
            assert [k["key"] for k in layer] == [k["key"] for k in keys]
            for expected_key, key in zip(layer, keys, strict=True):
                assert expected_key["shared_by"] == [s["token"] for s in key["shared_by"]]
        cosines = [[n["cosine"] for n in e["nearest"]] for e in (entry, token)]
        np.testing.assert_allclose(*cosines, atol=2e-3)


@pytest.mark.parametrize("name", ["demo-memory", "demo-flex"])
def test_memory_files_of_the_demo_models(name: str) -> None:
    """The committed memory files were written from the checkpoints beside them."""
    folder = Path("models") / name
    opened, arrays = open_checkpoint(folder), np.load(folder / "memory.npz")
    assert opened.model_id() == str(arrays["model_id"])
    assert opened.tokenizer_id == str(arrays["tokenizer_id"])


def test_live_counts_grow(cluster: Cluster) -> None:
    """The gateway's next poll shows the generated tokens and their rows."""
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


def test_the_shown_rows_are_named(cluster: Cluster, altered: Cluster, explored: Path) -> None:
    """The page names the model of its rows, and how the rows of a served table differ."""
    model = f"tiny-memory, {open_checkpoint(explored).model_id()[:12]}"
    own = f"Norms, keys and nearest tokens are those of the model's own rows ({model})."
    assert own == get(cluster, "/explore/live").json()["memory"]
    found = get(altered, "/explore/live").json()
    assert [2] == found["absent_layers"]
    changes = "(int8, edited, without layer 2)"
    differing = f"The rows of {found['tables'][0]} differ from them {changes}."
    assert f"{own} {differing}" == found["memory"]


def test_another_model_s_memory_is_hidden(cluster: Cluster, explored: Path, tmp_path: Path) -> None:
    """A memory file of another model is not shown, even if it fits; the log has one warning."""
    other = shutil.copytree(explored, tmp_path / "other")
    arrays = dict(np.load(explored / "memory.npz"))
    np.savez_compressed(other / "memory.npz", **arrays | {"model_id": np.array("f" * 64)})
    served = f"the workers serve tiny-memory ({str(arrays['model_id'])[:12]})"
    expected = f"It is of model ffffffffffff, but {served}: write it again"
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


def test_the_page_is_one_document(cluster: Cluster) -> None:
    """The page refers to no other file."""
    answer = get(cluster, "/explore")
    assert (200, "text/html; charset=utf-8") == (answer.status_code, answer.headers["content-type"])
    assert not re.search(
        r"""\s(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(""", answer.text
    )


@pytest.mark.parametrize("text", ["x" * 8_193, None, 5])
def test_bad_texts_are_refused(cluster: Cluster, text: object) -> None:
    """A text that is too long, and values that are not texts, get status 400."""
    assert 400 == post(cluster, "/explore/tokens", text=text).status_code


@pytest.mark.parametrize(
    ("token", "status"), [("512", 404), ("4294967296", 400), ("-1", 400), ("x", 400)]
)
def test_unknown_tokens_are_refused(cluster: Cluster, token: str, status: int) -> None:
    """An id outside the vocabulary gets 404, and text that is no id gets 400."""
    answer = get(cluster, f"/explore/tokens/{token}")
    assert (status, True) == (answer.status_code, bool(answer.json()["error"]["message"]))


@pytest.mark.parametrize("without", ["norms", "model_id", ""])
def test_a_malformed_memory_file_stops_the_gateway(
    explored: Path, tmp_path: Path, without: str
) -> None:
    """A file without an array, or that is no archive, is an error at start."""
    shutil.copytree(explored, tmp_path / "m")
    file = tmp_path / "m" / "memory.npz"
    arrays = {name: array for name, array in np.load(file).items() if name != without}
    np.savez_compressed(file, **arrays)
    if not without:
        file.write_bytes(b"no archive")
    done = tolhouse(f"gateway {tmp_path}/m --listen 127.0.0.1:0", code=1)
    assert "is not what `tolhouse explain --explorer` writes" in done.stderr


def test_a_memory_file_is_not_written_of_a_table(checkpoint: Path, tmp_path: Path) -> None:
    """The keys are the model's, so `--explorer` and `--table` exclude each other."""
    done = tolhouse(f"explain {checkpoint} --explorer {tmp_path}/m.npz --table x", code=1)
    assert "without --table" in done.stderr
    assert [] == list(tmp_path.iterdir())


def scored(cluster: Cluster, prompt: str, text: str, **options: object) -> list[float]:
    """Log probabilities of the tokens of `text` after `prompt`, by the public API."""
    body = {"prompt": prompt + text, "max_tokens": 0, "echo": True, "logprobs": 0, **options}
    found = post(cluster, "/v1/completions", **body).json()["choices"][0]["logprobs"]
    at = [offset >= len(prompt) for offset in found["text_offset"]]
    return [p for p, own in zip(found["token_logprobs"], at, strict=True) if own]


@pytest.mark.parametrize(
    "settings", [{"row_scale": -0.5}, {"layer_scales": [0, 1, 0.5, 2]}, {"layer_scales": [1] * 4}]
)
def test_completions_are_compared(cluster: Cluster, settings: dict) -> None:
    """Both completions are those of the API, and each token is scored under both settings."""
    found = post(cluster, "/explore/compare", text=TEXT, max_tokens=9, **settings).json()
    body = {"prompt": TEXT, "max_tokens": 9, "temperature": 0, "logprobs": 3}
    for side, own, other in (("original", {}, settings), ("changed", settings, {})):
        choice = post(cluster, "/v1/completions", **body, **own).json()["choices"][0]
        tokens, expected = found[side]["tokens"], choice["logprobs"]
        assert choice["text"] == found[side]["text"]
        assert choice["finish_reason"] == found[side]["finish_reason"]
        assert expected["tokens"] == [token["token"] for token in tokens]
        at = side == "changed"
        scores = [token["logprobs"][at] for token in tokens]
        np.testing.assert_allclose(expected["token_logprobs"], scores, atol=1e-4)
        likeliest = [{t["token"] for t in token["likeliest"][at]} for token in tokens]
        assert all(
            top <= set(t) for top, t in zip(likeliest, expected["top_logprobs"], strict=True)
        )
        rescored = scored(cluster, TEXT, choice["text"], **other)
        if len(rescored) == len(tokens):  # the text may be split into other tokens
            others = [token["logprobs"][not at] for token in tokens]
            np.testing.assert_allclose(rescored, others, atol=1e-4)


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"text": "x" * 8_193},
        {"text": TEXT, "max_tokens": 0},
        {"text": TEXT, "max_tokens": 257},
        {"text": TEXT, "layer_scales": [1, 0]},
        {"text": TEXT, "row_scale": 17},
        {"text": TEXT, "row_scale": None, "unknown": 1},
    ],
)
def test_bad_comparisons_are_refused(cluster: Cluster, body: dict) -> None:
    """A bad text, length or scale gets status 400 with a message."""
    answer = post(cluster, "/explore/compare", **body)
    assert (400, True) == (answer.status_code, bool(answer.json()["error"]["message"]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not chromium.CHROMIUM:
        pytest.skip("no chromium on the PATH")
    with chromium.browser() as opened:
        yield opened


@pytest.fixture
def page(cluster: Cluster, browser: Browser) -> Iterator[Page]:
    """The page with TEXT, after its first completion."""
    with chromium.explorer_page(browser, cluster.gateway) as opened:
        opened.fill("#prompt", TEXT)
        settle(opened)
        yield opened


def settle(page: Page) -> None:
    """Wait until the page shows tokens and completions of its current text and settings."""
    expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ tokens?$"))


def verdict(page: Page) -> Locator:
    return page.locator("#verdict")


def visible(token: str) -> str:
    """A token as the page writes it."""
    if token.startswith("bytes:"):
        return token.removeprefix("bytes:")
    mark = unicodedata.category(token[0]).startswith("M")

    def sign(c: str) -> str:
        shapeless = unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs")
        code = f"U+{ord(c):04X}" if shapeless or (mark and c == token[0]) else c
        return {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}.get(c, code)

    return "".join(map(sign, token))


def pieces(page: Page, side: str) -> list[str]:
    """The tokens of a completion, as the page writes them."""
    shown = page.locator(f"#{side} .piece").all_text_contents()
    return [text.replace("⏎\n", "⏎") for text in shown]


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def test_the_page_works_by_keyboard(page: Page, cluster: Cluster) -> None:
    """Tab reaches each control; arrow keys move cells, and Enter follows tokens and comes back."""
    order = []
    page.locator("#prompt").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(focused(page))
        if order[-1] == "column":
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowDown")
            expect(page.locator("#cell")).to_have_text(re.compile("layer 1, norm"))
            break
    assert ["norms", "column"] == order
    ids = [token["id"] for token in post(cluster, "/explore/tokens", text=TEXT).json()["tokens"]]
    expect(page.locator("#detail .dim").first).to_have_text(f"Token id {ids[1]}")
    expect(page.locator("#detail .now")).to_contain_text("Layer 1")
    expect(page.locator("#detail .key")).to_have_count(3)
    for key, token, layer in (("End", -1, "1"), ("PageDown", -1, "3"), ("Home", 0, "3")):
        page.keyboard.press(key)
        expect(page.locator("#detail .dim").first).to_have_text(f"Token id {ids[token]}")
        expect(page.locator("#detail .now")).to_contain_text(f"Layer {layer}")
    expect(page.locator("#detail .key")).to_have_count(3)
    page.keyboard.press("Tab")  # a token that shares a key
    name = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    expect(page.locator("#detail h2")).to_have_text(name)
    expect(page.locator("#detail h2")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # back
    expect(page.locator("#map .column").first).to_be_focused()
    page.locator("#reset").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # all layers are off
    expect(page.locator(".scale output").first).to_have_text("absent")
    expect(verdict(page)).to_contain_text("Your settings change")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    expect(page.locator(".scale output").first).to_have_text("2.00")
    page.locator(".scale input").last.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#original .piece").nth(1)).to_be_focused()
    expect(page.locator("#position")).to_contain_text("Token 2, ")
    page.keyboard.press("Tab")
    expect(page.locator("#changed .piece").first).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#odds tbody tr")).to_have_count(24)


def test_the_heat_map_shows_norms(page: Page, cluster: Cluster) -> None:
    """A pointed or selected cell shows its token, layer and norm; a click selects it."""
    tokens = post(cluster, "/explore/tokens", text=TEXT).json()["tokens"]
    cells = page.locator("#map .cells")
    expect(cells).to_have_count(len(tokens))
    for n, layer in ((0, 0), (3, 2), (len(tokens) - 1, 3)):
        height = cells.nth(n).bounding_box()["height"] / 4
        norm, at = f"{tokens[n]['norms'][layer]:.2f}", {"x": 5, "y": (layer + 0.5) * height}
        cells.nth(n).hover(position=at)
        expect(page.locator("#tip")).to_contain_text(f"id {tokens[n]['id']}")
        expect(page.locator("#tip")).to_contain_text(f"Layer {layer} · norm {norm}")
        cells.nth(n).click(position=at)
        label = page.locator("#map .column[aria-pressed=true]").get_attribute("aria-label")
        assert label.endswith(f"id {tokens[n]['id']}, layer {layer}, norm {norm}")
        expect(page.locator("#detail .now .number")).to_have_text(norm)
    norms = np.array([token["norms"] for token in tokens])
    expect(page.locator("#map-legend")).to_contain_text(f"norm {norms.min():.1f}")
    page.select_option("#norms", "layer")
    expect(page.locator("#map-legend")).to_contain_text("smallest norm of its layer")


def test_the_page_compares_completions(page: Page, cluster: Cluster) -> None:
    """Sliders change one completion only; its tokens have the change of their log probability."""
    before = pieces(page, "original")
    page.locator(".scale input").first.fill("-0.5")
    expect(verdict(page)).to_contain_text("The completions differ from token")
    body = {"text": TEXT, "max_tokens": 24, "row_scale": -0.5}
    found = post(cluster, "/explore/compare", **body).json()
    sides = [found["original"]["tokens"], found["changed"]["tokens"]]
    texts = [[visible(token["token"]) for token in side] for side in sides]
    assert [texts[0], *texts] == [before, pieces(page, "original"), pieces(page, "changed")]
    for side, name, columns in ((0, "original", (3, 4)), (1, "changed", (6, 7))):
        scores = [[token["logprobs"][side] for token in sides[side]]]
        scores.append([token["logprobs"][1] - token["logprobs"][0] for token in sides[side]])
        for column, values in zip(columns, scores, strict=True):
            cells = page.locator(f"#odds td:nth-child({column})").all_text_contents()
            shown = [float(cell.replace("−", "-")) for cell in cells if cell]
            np.testing.assert_allclose(values, shown, atol=6e-4)
        title = page.locator(f"#{name} .piece").first.get_attribute("title")
        assert title.endswith(f"change {scores[1][0]:+.2f}".replace("-", "−"))
    first = next(n for n, (a, b) in enumerate(zip(*sides, strict=True), 1) if a["id"] != b["id"])
    assert str(first) == page.locator("#odds tr.first td").first.text_content()
    expect(page.locator("#original .differs")).to_have_count(24 - first + 1)
    page.click("#reset")
    expect(verdict(page)).to_contain_text("The memory is unchanged")


def shown_state(page: Page) -> list[object]:
    fields = [page.input_value(f"#{name}") for name in ("prompt", "count", "norms")]
    scales = page.locator(".scale output").all_inner_texts()
    selected = page.locator("#map .column[aria-pressed=true]").get_attribute("aria-label")
    return [*fields, scales, selected, pieces(page, "changed")]


def test_the_address_carries_the_state(page: Page, cluster: Cluster, browser: Browser) -> None:
    """A copied link opens the same text, settings and cell; back and forward restore them."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#prompt", "a = 'ü & #1'\n\tb%2B+c")
    page.fill("#count", "7")
    page.locator(".scale input").first.fill("1.5")
    page.locator(".toggle").nth(2).click()
    page.select_option("#norms", "layer")
    page.locator("#map .column").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(verdict(page)).to_contain_text("Your settings change")
    expect(page.locator("#odds tbody tr")).to_have_count(7)
    page.click("#copy")
    expect(page.locator("#status")).to_have_text("The link is copied.")
    link, state = page.evaluate("navigator.clipboard.readText()"), shown_state(page)
    assert ["1.50", "1.00", "absent", "1.00", "1.00"] == state[3]
    with chromium.explorer_page(browser, cluster.gateway, link[link.index("#") :]) as other:
        expect(verdict(other)).to_contain_text("Your settings change")
        assert state == shown_state(other)
    page.locator("#examples button").nth(1).click()
    expect(page.locator(".scale output").nth(1)).to_have_text("absent")
    expect(verdict(page)).to_contain_text("Your settings change")
    example = page.input_value("#prompt")
    page.go_back()
    expect(page.locator("#prompt")).to_have_value("a = 'ü & #1'\n\tb%2B+c")
    expect(page.locator(".scale output").nth(2)).to_have_text("absent")
    expect(page.locator("#count")).to_have_value("7")
    page.go_forward()
    expect(page.locator("#prompt")).to_have_value(example)
    expect(page.locator(".scale output").nth(1)).to_have_text("absent")


@pytest.mark.parametrize(
    "fragment",
    [
        "#%",
        "#text=%E0%A4%A&tokens=NaN&scale=1e999&layers=,,x,-1e9&token=-5&layer=1e308",
        "#tokens=0&token=999999&layer=999&norms=<b>&scale=&layers=" + "9," * 3000,
        "#text=def&__proto__=1&constructor=2&layers=%00",
        "#" + "text=a&" * 50,
    ],
)
def test_a_malformed_address_does_not_break_the_page(
    cluster: Cluster, browser: Browser, fragment: str
) -> None:
    """Malformed fields get their defaults or the nearest allowed value."""
    with chromium.explorer_page(browser, cluster.gateway, fragment) as page:
        expect(verdict(page)).not_to_be_empty()
        expect(page.locator("#errors")).to_be_empty()
        assert 1 <= int(page.input_value("#count")) <= 256
        expect(page.locator(".scale")).to_have_count(5)
        expect(page.locator("#map .column[aria-pressed=true]")).to_have_count(1)


def test_examples_load_text_and_settings(page: Page) -> None:
    """Each example gives a text, scales and two completions."""
    texts = set()
    for n in range(page.locator("#examples button").count()):
        page.locator("#examples button").nth(n).click()
        texts.add(page.input_value("#prompt"))
        expect(page.locator("#original[aria-busy]")).to_have_count(0)
        expect(verdict(page)).not_to_be_empty()
    assert 8 == len(texts)
    expect(page.locator("#errors")).to_be_empty()


def test_token_text_is_visible_and_inert(page: Page) -> None:
    """Spaces and line ends have signs, bytes and format characters codes; markup stays text."""
    page.fill("#prompt", "<img src=x onerror=alert(1)>\n\t é\u202e")
    expect(page.locator("#map")).to_contain_text("img")
    labels = "".join(page.locator("#map .column > .token-text").all_inner_texts())
    assert labels.startswith("<img␣src=x␣onerror=alert(1)>⏎⇥␣")
    assert re.search(r"(\\x[0-9a-f]{2}|U\+202E)$", labels)
    assert 0 == page.locator("main img").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(cluster: Cluster, browser: Browser, scheme: str) -> None:
    """The system's theme applies until the toggle chooses one, which a reload keeps."""
    background = "getComputedStyle(document.body).backgroundColor"
    pages = {"light": "rgb(246, 247, 249)", "dark": "rgb(14, 17, 22)"}
    with chromium.explorer_page(browser, cluster.gateway, color_scheme=scheme) as page:
        assert pages[scheme] == page.evaluate(background)
        for theme in ("light", "dark"):
            page.click("#theme")
            assert pages[theme] == page.evaluate(background)
            page.reload()
            expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
            assert pages[theme] == page.evaluate(background)
        page.click("#theme")
        assert pages[scheme] == page.evaluate(background)


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_the_page_fits_its_window(cluster: Cluster, browser: Browser, width: int) -> None:
    """No window is too narrow: nothing but the heat map and the table scrolls sideways."""
    size = {"width": width, "height": 700}
    with chromium.explorer_page(browser, cluster.gateway, "#scale=0", viewport=size) as page:
        expect(verdict(page)).to_contain_text("Your settings change")
        page.click("summary")
        assert width >= page.evaluate("document.documentElement.scrollWidth")


def test_sparklines(cluster: Cluster, browser: Browser) -> None:
    """Counters become rates, never negative ones; polls stop while the tab is hidden."""
    counts = {"workers": 1, "tokens": 0, "from_cache": 0, "from_remote": 0, "fetches": 0}
    counts |= {"fetch_seconds": 0.0, "from_file": 0, "recomputed": 0, "running": 2, "waiting": 1}
    names = {"models": ["m"], "tables": ["m@1"], "absent_layers": [], "memory": ""}
    sizes, polls = {"weight_bytes": 1, "dense_weight_bytes": 4}, []

    def answer(route: Route) -> None:
        polls.append(dict(counts))
        route.fulfill(
            body=json.dumps({**counts, **names, **sizes}), content_type="application/json"
        )

    with chromium.explorer_page(browser, cluster.gateway, clock=True) as page:
        page.route("**/explore/live", answer)
        values, drawn = page.locator("#live strong"), page.locator("#live path.line")

        def poll() -> None:
            seen = len(polls)
            wait_until(lambda: page.clock.run_for(1000) or len(polls) > seen, "a poll")
            expect(page.locator("#model")).to_have_text("m · table m@1")

        poll()
        poll()
        expect(values).to_have_text(["0.0", "–", "–", "1"])
        counts |= {"tokens": 40, "from_cache": 30, "from_remote": 10, "fetches": 4}
        counts["fetch_seconds"] = 0.01
        poll()
        expect(values.nth(1)).to_have_text("75.0")
        expect(values.nth(2)).to_have_text("2.50")
        assert 0 < float(values.first.inner_text())
        expect(page.locator("#live svg").first).to_have_attribute("aria-label", re.compile("now"))
        assert "L" in drawn.first.get_attribute("d")
        counts["tokens"] = 3
        poll()
        rate = values.first.inner_text()
        poll()
        expect(values.first).to_have_text("0.0")
        assert not rate.startswith("−")
        hide = (
            "hidden => Object.defineProperty(document, 'hidden', {value: hidden, writable: true})"
        )
        change = "document.dispatchEvent(new Event('visibilitychange'))"
        page.evaluate(hide, True)
        page.evaluate(change)
        seen = len(polls)
        page.clock.run_for(60_000)
        assert seen == len(polls)
        page.evaluate("document.hidden = false")
        page.evaluate(change)
        wait_until(lambda: page.evaluate("0") or len(polls) > seen, "a poll")


def test_an_older_answer_is_dropped(page: Page) -> None:
    """A request for a text that has changed is cancelled."""
    held = []

    def hold(route: Route) -> None:
        if "older" in (route.request.post_data or ""):
            held.append(route)
        else:
            route.continue_()

    page.route("**/explore/tokens", hold)
    with page.expect_event("requestfailed", lambda request: "older" in (request.post_data or "")):
        page.fill("#prompt", "older older older")
        wait_until(lambda: page.evaluate("0") or held, "the request")
        page.fill("#prompt", "def")
    expect(page.locator("#map .token-text")).to_have_text(["def"])


def test_details_of_an_older_selection_do_not_move_the_focus(page: Page) -> None:
    """A selected token whose details are known cancels the request for those of another."""
    held: list[Route] = []
    page.locator("#map .column").first.click()
    expect(page.locator("#detail .key")).to_have_count(3)
    page.route("**/explore/tokens/*", lambda route: held.append(route))
    with page.expect_event("requestfailed", lambda request: "/explore/tokens/" in request.url):
        page.keyboard.press("End")
        wait_until(lambda: page.evaluate("0") or held, "the request")
        page.keyboard.press("Home")
    expect(page.locator("#detail .key")).to_have_count(3)


def test_texts_that_are_too_long(page: Page) -> None:
    """The page says what to do, shows no old result, and keeps the text."""
    unavailable = "The completion is not available."
    for text, message in (("word " * 3000, "at most 8192"), ("x y " * 1000, "context")):
        page.fill("#prompt", text)
        expect(page.locator("#errors p")).to_contain_text([message])
        assert text == page.input_value("#prompt")
        expect(page.locator("#original, #changed")).to_have_text(2 * [unavailable])
        expect(page.locator("#odds, #verdict")).to_have_text(2 * [""])
    page.fill("#prompt", "")
    expect(page.locator("#original")).to_have_text("Type a text above to complete it.")
    expect(page.locator("#map")).to_have_text("Type a text above to see its tokens.")
    page.fill("#prompt", "def")
    expect(verdict(page)).not_to_be_empty()
    expect(page.locator("#errors")).to_be_empty()


@contextmanager
def gateway_page(browser: Browser, model: Path, *options: str) -> Iterator[Page]:
    with process("gateway", str(model), "--listen", "127.0.0.1:0", *options) as gateway:
        with chromium.explorer_page(browser, gateway.address) as page:
            yield page


def test_keys_and_limits(
    cluster: Cluster, browser: Browser, explored: Path, tmp_path: Path
) -> None:
    """Without a key the page asks for one; over the limit it tries again; the text stays."""
    keys = tmp_path / "keys.json"
    generous, limited = add_key(keys, "one", 60_000, 1000), add_key(keys, "two", 1, 1)
    polled = ("--workers", cluster.workers, "--poll-seconds", "0.2", "--keys-file", str(keys))
    with gateway_page(browser, explored, *polled) as page:
        errors = page.locator("#errors p")
        for key, message in (("", "requires an API key"), ("wrong", "requires an API key")):
            page.fill("#key", key)
            page.fill("#prompt", f"{TEXT} {key}")
            expect(errors).to_have_count(1)
            expect(errors).to_contain_text(message)
            expect(page.locator("#key-field.wanted")).to_have_count(1)
        page.fill("#key", limited)
        page.keyboard.press("Enter")
        expect(errors.first).to_contain_text("1 per minute are allowed")
        expect(page.locator("#errors")).to_contain_text("The page tries again by itself.")
        assert f"{TEXT} wrong" == page.input_value("#prompt")
        page.fill("#key", generous)
        page.keyboard.press("Enter")
        expect(verdict(page)).not_to_be_empty()
        expect(page.locator("#errors")).to_be_empty()
        expect(page.locator("#key-field.wanted")).to_have_count(0)
        assert generous not in page.url


def test_no_worker_and_no_memory_file(checkpoint: Path, store: str, browser: Browser) -> None:
    """The page says how to get both, and goes on by itself once a worker is there."""
    with process("worker", str(checkpoint), "--listen", "127.0.0.1:0", "--rows", store) as worker:
        address = worker.address
    polled = ("--workers", address, "--poll-seconds", "0.2")
    with gateway_page(browser, checkpoint, *polled) as page:
        page.fill("#prompt", TEXT)
        expect(page.locator("#errors p")).to_contain_text(["No worker is healthy. Start one"])
        expect(page.locator("#memory")).to_contain_text("tolhouse explain CHECKPOINT --explorer")
        expect(page.locator("#map .column")).not_to_have_count(0)
        with process("worker", str(checkpoint), "--listen", address, "--rows", store):
            expect(verdict(page)).not_to_be_empty()
            expect(page.locator("#errors")).to_be_empty()
            expect(page.locator("#prompt")).to_have_value(TEXT)
            expect(page.locator("#detail")).to_contain_text("no memory data")


def test_a_gateway_that_stops(cluster: Cluster, browser: Browser, explored: Path) -> None:
    """The page says that the gateway does not answer, and keeps the text."""
    with process("gateway", str(explored), "--listen", "127.0.0.1:0") as gateway:
        with chromium.explorer_page(browser, gateway.address) as page:
            expect(page.locator("#map .column")).not_to_have_count(0)
            gateway.popen.kill()
            gateway.popen.wait()
            page.fill("#prompt", TEXT)
            expect(page.locator("#errors")).to_contain_text("The gateway does not answer.")
            assert TEXT == page.input_value("#prompt")


def test_layers_without_rows(altered: Cluster, browser: Browser) -> None:
    """A layer that the table lacks has no scale, and a reset does not give it one."""
    with chromium.explorer_page(browser, altered.gateway) as page:
        expect(page.locator(".scale").nth(3)).to_contain_text("not in table")
        page.click("#reset")
        expect(verdict(page)).not_to_be_empty()
        scales = page.locator(".scale output").all_inner_texts()
        assert ["1.00", "1.00", "1.00", "not in table", "1.00"] == scales
        assert page.locator(".scale").nth(3).locator("input").is_disabled()
        expect(page.locator("#memory")).to_contain_text("(int8, edited, without layer 2)")


@pytest.mark.parametrize(("kind", "scales"), [("base", 0), ("wide", 1)])
def test_other_kinds_of_models(kind: str, scales: int, browser: Browser, tmp_path: Path) -> None:
    """A model without rows has nothing to scale; rows for all layers have one scale."""
    model, url = tiny_model(tmp_path / f"tiny-{kind}", kind), f"file://{tmp_path}/tables"
    rows = ()
    if kind == "wide":
        build_table(model, url)
        tolhouse(f"explain {model} --explorer {model}/memory.npz")
        rows = ("--rows", url)
    with process("worker", str(model), "--listen", "127.0.0.1:0", *rows) as worker:
        polled = ("--workers", worker.address, "--poll-seconds", "0.2")
        with gateway_page(browser, model, *polled) as page:
            expect(verdict(page)).not_to_be_empty()
            expect(page.locator(".scale")).to_have_count(scales)
            if scales:
                expect(page.locator("#detail")).to_contain_text("Strongest keys, all layers")
                page.click(".toggle")
                expect(verdict(page)).to_contain_text("Your settings change")
            else:
                expect(page.locator("#mixer")).to_contain_text("no memory rows to scale")
