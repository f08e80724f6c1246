"""The service's page in headless Chromium: a photograph is chosen, enlarged, compared and offered for download."""

import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from running_service import dng, picture, running, write_model

from pipelines.serving.models import Models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; install Debian's package chromium"),
]
CUT = "parseFloat(getComputedStyle(document.querySelector('#before')).clipPath.split(' ')[1])"
"""Pixels that are cut off the right side of the picture "before"."""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    model = write_model(folder / "model")
    (folder / "work").mkdir()
    with running(Models(folder / "data", str(model)), folder / "work", upload_mb=1) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photo.png").write_bytes(picture(240, 320))
    return tmp_path / "photo.png"


def choose(browser, path):
    """Choose a file, as a user does in the file dialogue."""
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    element = browser.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(path)], nodeId=element)


def press(browser, key):
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"ArrowRight": 39}[key]
        )


def shown(browser, selector):
    return browser.run(f"document.querySelector('{selector}').checkVisibility()")


@pytest.mark.parametrize("width", [390, 1400])
def test_a_photo_is_enlarged_and_compared(browser, service, photo, width):
    browser.open(f"{service.address}/", width)
    browser.wait_for("up to 1 MB and 50 megapixels", "Model: model")
    choose(browser, photo)
    browser.wait_for("1280 × 960 pixels")
    assert browser.run("[before.naturalWidth, after.naturalWidth]") == [320, 1280]
    assert browser.run("document.querySelector('#download').download") == "photo_4x.png"
    room = browser.run("document.querySelector('#pictures').getBoundingClientRect().width")
    assert browser.run(CUT) == pytest.approx(room / 2, abs=1)
    browser.run("document.querySelector('#cut').focus()")
    for _ in range(20):
        press(browser, "ArrowRight")
    assert browser.run(CUT) == pytest.approx(room * 0.4, abs=1)
    browser.run("document.querySelector('#full').click()")
    assert browser.run("document.querySelector('#pictures').getBoundingClientRect().width") == 1280
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.errors == []


def test_a_raw_is_shown_as_the_service_decoded_it(browser, service, tmp_path):
    browser.open(f"{service.address}/", 1400)
    choose(browser, dng(tmp_path / "photo.dng"))
    browser.wait_for("256 × 192 pixels")
    assert browser.run("[before.naturalWidth, after.naturalWidth]") == [64, 256] and shown(browser, "#frame")


def test_a_tiff_is_offered_without_a_comparison(browser, service, photo):
    browser.open(f"{service.address}/", 390)
    browser.run("document.querySelector('#format').value = 'tiff'")
    choose(browser, photo)
    browser.wait_for("Browsers cannot show TIFF", "Download")
    assert not shown(browser, "#frame") and browser.run("document.querySelector('#download').download").endswith(".tif")


def test_a_refusal_is_shown_on_the_page(browser, service, tmp_path):
    browser.open(f"{service.address}/", 390)
    (tmp_path / "notes.txt").write_text("no photograph")
    choose(browser, tmp_path / "notes.txt")
    browser.wait_for("notes.txt: expected a photograph (RAW, JPG or PNG), got text: not a photograph")
    (tmp_path / "large.bin").write_bytes(bytes(2_000_000))
    choose(browser, tmp_path / "large.bin")
    browser.wait_for("large.bin: expected at most 1 MB, got 2")
    assert not shown(browser, "#result") and not shown(browser, "#work")


def test_the_page_for_programs_lists_every_option(browser, service, tmp_path):
    for width in (390, 1400):
        browser.open(f"{service.address}/docs", width)
        text = browser.wait_for("POST /zoom", "quality", "Of jpg, 1 to 100. Default: 95.", "GET /healthz", "503")
        assert f'curl -F photo=@PHOTO.jpg "{service.address}/zoom' in text
        assert browser.run("document.documentElement.scrollWidth") == width
    browser.screenshot(tmp_path / "docs.png")
    assert Image.open(tmp_path / "docs.png").width == 1400
