"""The pictures of the explorer page in docs/images, taken of the demo model under load.

python -m tests.pictures
"""

import io
import itertools
import tempfile
import threading
from pathlib import Path

import httpx
from PIL import Image
from tolhouse.demo import PROMPTS
from tolhouse.testing import build_table, local_cluster

from tests.browser import browser, explorer_page

MODEL, FOLDER = Path("models/demo-memory"), Path("docs/images")
EXAMPLE, TOKEN = 2, 5  # the example "No layer 1", and the token " encoding"
SECONDS = 120  # of the sparklines


def load(gateway: str, stopped: threading.Event) -> None:
    """Complete prompts, with pauses that vary, until `stopped` is set."""
    for n, prompt in zip(itertools.count(), itertools.cycle(PROMPTS)):
        body = {"prompt": f"# {n}\n{prompt}", "max_tokens": 16 + 24 * (n % 7)}
        httpx.post(f"http://{gateway}/v1/completions", json=body, timeout=60)
        if stopped.wait(0.3 * (n % 5)):
            return


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        build_table(MODEL, f"file://{folder}")
        options = {"worker_options": ("--row-cache-megabytes", "6")}
        with local_cluster(MODEL, f"file://{folder}", **options) as cluster:
            stopped = threading.Event()
            caller = threading.Thread(target=load, args=(cluster.gateway, stopped))
            caller.start()
            size = {"width": 1280, "height": 900}
            view = {"viewport": size, "device_scale_factor": 1.5}
            with explorer_page(opened, cluster.gateway, **view) as page:
                page.locator("#examples button").nth(EXAMPLE).click()
                page.locator("#map .column").nth(TOKEN).click()
                page.keyboard.press("PageUp")
                page.keyboard.press("ArrowDown")
                page.wait_for_timeout(1000 * SECONDS)
                page.locator("#changed .piece").nth(3).focus()
                for theme in ("light", "dark"):
                    page.click("#theme")
                    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                    file = FOLDER / f"explorer-{theme}.png"
                    few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=0)
                    few.save(file, optimize=True)
            stopped.set()
            caller.join()


if __name__ == "__main__":
    main()
