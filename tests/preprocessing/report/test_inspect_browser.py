"""The report in Chromium, at the widths of a phone, a tablet and a desktop."""

import json
import shutil
import time

import pytest
from browser import CHROMIUM, Browser

from preprocessing import schema
from preprocessing.report.inspect import inspect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; install Debian's package chromium"),
]
ROW = "article.pair"
LEFT = "document.querySelector('.two figure').getBoundingClientRect().x"


@pytest.fixture(scope="module")
def page(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(tiny_shards, folder / "shards")
    (folder / "shards" / "_quarantine").mkdir()
    for number, name in enumerate(("<script>document.title='harmed'</script>", "a" * 300, "00001")):
        entry = {"sequence": name, "pair": "00005-00001", "reason": f"{name}/00005.ARW: " + "damaged " * 30}
        (folder / "shards" / "_quarantine" / f"{number}.json").write_text(json.dumps(entry))
    (folder / "report.html").write_text(inspect(str(folder / "shards")))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_the_screen_and_shows_its_pictures(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == width
    outside = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.run(f"{outside}.map(e => e.outerHTML.slice(0, 80))") == []
    pictures = browser.run("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(pictures) == 15 and min(pictures) == 192  # tiles of 24 packed pixels at 4x
    assert browser.errors == [] and browser.run("document.title").startswith("SDAN shards")
    shade = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) < 150) == dark


def test_pointing_at_a_pair_swaps_lr_and_hr(browser, page):
    browser.open(page, 1280)
    browser.point_at(".two")
    seen = set()
    until = time.monotonic() + 10
    while len(seen) < 2 and time.monotonic() < until:
        seen.add(round(browser.run(LEFT)))
    assert len(seen) == 2
    width = browser.run("document.querySelector('.two figure').getBoundingClientRect().width")
    assert max(seen) - min(seen) == pytest.approx(width + 6, abs=1)  # exactly onto its neighbour
    browser.point_at("h1")
    assert {round(browser.run(LEFT)) for _ in range(40)} <= {round(browser.run(LEFT))}


def test_a_tap_swaps_lr_and_hr_on_a_phone(browser, page):
    browser.open(page, 360)
    before = round(browser.run(LEFT))
    browser.tap(".two")
    until = time.monotonic() + 10
    while round(browser.run(LEFT)) == before:
        assert time.monotonic() < until


def test_the_policy_blocks_injected_content(browser, page):
    """Even if escaping failed, scripts, styles and external pictures would not run or load."""
    harmed = page.with_name("harmed.html")
    harm = "<script>document.title='harmed'</script><img src='https://example.com/x.png'><p style='color:red'>x</p>"
    harmed.write_text(page.read_text().replace("<footer>", harm + "<footer>"))
    browser.open(harmed, 1280)
    blocked = [error for error in browser.errors if "Content Security Policy" in error]
    assert browser.run("document.title") != "harmed" and len(blocked) >= 3
    browser.errors.clear()
    assert schema.list_shards(str(page.parent / "shards"))
