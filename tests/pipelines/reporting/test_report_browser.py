"""report.html in Chromium: at a phone's and a desktop's width, by keyboard and by touch."""

import pytest
from browser import CHROMIUM, Browser
from report_example import METHODS, report

from pipelines.reporting.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; install Debian's package chromium"),
]
BORDER = "document.getElementById('before').style.clipPath"


def keys(browser, *names):
    for name in names:
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=CODES[name])


CODES = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "Tab": 9}


def test_report_by_keyboard_and_touch_at_two_widths(tmp_path):
    page = tmp_path / "report.html"
    write_report(page, report())
    with Browser() as browser:
        for width in (390, 1400):
            browser.open(page, width)
            assert browser.run("document.documentElement.scrollWidth") == width
            sizes = browser.run("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
            assert min(sizes) > 0 and browser.run("document.getElementById('after').naturalWidth") == 96
        assert browser.run("document.title") == "SDAN: Evaluation, simulated data"
        assert browser.run("document.getElementById('near').textContent") == METHODS[0]
        assert browser.run("document.getElementById('far').textContent") == METHODS[1]
        browser.run("document.getElementById('at').focus()")
        assert browser.run(BORDER) == "inset(0px 50% 0px 0px)"
        keys(browser, "ArrowRight", "ArrowRight")
        assert browser.run(BORDER) == "inset(0px 48% 0px 0px)"
        keys(browser, "Home")
        assert browser.run(BORDER) == "inset(0px 100% 0px 0px)"
        browser.open(page, 390)
        browser.tap("#at")
        assert browser.run("Math.abs(document.getElementById('at').value - 50)") < 3
        shown = "document.getElementById('after').src"
        first = browser.run(shown)
        browser.run("(c => { c.value = '1'; c.dispatchEvent(new Event('change')) })(document.getElementById('crop'))")
        assert browser.run(shown) != first
        assert browser.errors == []
