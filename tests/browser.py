"""The explorer page in a headless Chromium, for tests and for the pictures in docs/images."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_COUNT_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", event => violations.push(event.violatedDirective));
"""


@contextmanager
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)
    options = ["--no-sandbox", "--disable-gpu", "--no-proxy-server"]
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@contextmanager
def explorer_page(
    opened: Browser, gateway: str, fragment: str = "", *, clock: bool = False, **options: object
) -> Iterator[Page]:
    """The page of the gateway at `gateway`, in a browser context with `options`.

    Only the gateway can be reached. Requests elsewhere, script errors and violations of the
    content security policy fail the test. With `clock`, the page's timers wait for `page.clock`.
    """
    base, faults = f"http://{gateway}/", list[str]()
    context = opened.new_context(**options)
    context.add_init_script(_COUNT_VIOLATIONS)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith(base) else faults.append(one.url))
    page.route(lambda url: not url.startswith(base), lambda route: route.abort())
    if clock:
        page.clock.install()
    page.goto(f"{base}explore{fragment}")
    yield page
    assert [] == faults + page.evaluate("violations")
    context.close()
