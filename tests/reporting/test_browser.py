"""The page in a real browser, without a network: no errors, no requests, and its script works."""

import json
import re
import shutil
import subprocess

import pytest

from infmae_jax.report import write_report
from tests.reporting.run_folders import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_BROWSER = "not an origin"


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function: page -> (DOM as text after its script ran, console messages, addresses asked for)."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here (looked for {', '.join(BROWSERS)}); the HTML parser's tests in test_page.py ran")

    def visit(path):
        profile = tmp_path_factory.mktemp("profile")
        log = profile / "net.json"
        done = subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
                "--enable-logging=stderr", f"--log-net-log={log}", "--window-size=1200,900",
                "--virtual-time-budget=2000", "--dump-dom", path.resolve().as_uri(),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        requests = [event["params"] for event in json.loads(log.read_text())["events"] if "params" in event]
        # The browser's own requests (is there an update?) come from no page.
        asked = {r["url"] for r in requests if "url" in r and r.get("initiator", _BROWSER) != _BROWSER}
        return done.stdout, console, {url for url in asked if url.startswith("http")}

    return visit


def test_browser_shows_the_page_without_errors_or_requests(eventful, browse):
    dom, console, asked = browse(write_report(eventful))
    text = Page(dom).text
    for told in ("finished step 100 of 100", "loss, best", "rollback (1)", "hit/a.jpg", "versions.jax"):
        assert told in text
    assert not console and not asked


def test_browser_values_under_the_pointer(eventful, browse):
    path = write_report(eventful)
    # The page's own policy forbids foreign scripts, so it is taken out for this one.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    move = """<script>
        const svg = document.querySelector("figure svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 4, clientY: box.top + 9}));
        </script>"""
    path.write_text(html.replace("</body>", move + "</body>"))
    dom, console, _ = browse(path)
    shown = re.findall(r"<output>(.*?)</output>", dom)
    assert shown[:2] == ["step 99: 0.51", "step 99: 0.001"] and not console
    assert 'class="cross" visibility="visible"' in dom


def test_browser_refuses_what_is_not_ours(eventful, browse):
    """The tests above can fail: a foreign script is stopped by the policy, a request is noticed."""
    path = write_report(eventful)
    foreign = "<script>document.title = 'taken over'</script><img src='http://elsewhere.example/x.png'>"
    path.write_text(path.read_text().replace("</body>", foreign + "</body>"))
    dom, console, asked = browse(path)
    assert "<title>run: finished</title>" in dom and len(console) >= 2 and not asked
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text()))
    dom, console, asked = browse(path)
    assert "<title>taken over</title>" in dom and "http://elsewhere.example/x.png" in asked
