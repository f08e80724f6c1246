"""The service over HTTP, without Ray: answers, limits, hostile uploads, and the exchange of its model."""

import asyncio
import io
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from fake_decoder import fake_decoder_path
from PIL import Image
from running_service import dng, opened, picture, running, write_model

from pipelines import registry
from pipelines.serving import service as service_module
from pipelines.serving.desk import Wish
from pipelines.serving.limits import SEATS, Limits, Refused, ServeError
from pipelines.serving.models import Models
from pipelines.serving.uploads import safe_name
from pipelines.zoom import Output, Zoomer, zoom_photos


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "untrained")


@pytest.fixture(scope="module")
def service(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{fake_decoder_path(folder)}:{Path(__file__).parents[3]}")
        models = Models(folder / "data", str(model))
        with running(models, folder / "work", upload_mb=4, megapixels=1.5) as started:
            started.work = folder / "work"
            assert started.zoom(picture()).status_code == 200
            yield started


@pytest.fixture
def limited(service):
    """Changes the limits of the service for one test."""
    desk, before = service.app.state.desk, service.app.state.desk.limits

    def change(**limits):
        desk.limits = replace(before, **limits)

    yield change
    desk.limits = before


def refused(answer, *codes):
    """The one line of a refusal."""
    assert answer.status_code in codes, (answer.status_code, answer.text)
    assert answer.text.endswith("\n") and answer.text.count("\n") == 1 and "Traceback" not in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text.rstrip()


@pytest.mark.parametrize(
    ("query", "output"),
    [
        ({}, Output("png")),
        ({"bits": 16, "scale": 2}, Output("png", bits=16, scale=2)),
        ({"format": "jpg", "quality": 80}, Output("jpg", quality=80)),
        ({"format": "tiff", "crop": "8,4,20,24", "gps": False}, Output("tiff", crop=(8, 4, 20, 24), gps=False)),
    ],
)
def test_an_answer_has_the_bytes_of_a_zoom(service, model, tmp_path, query, output):
    exif = Image.Exif()
    exif[0x0110] = "Camera"
    exif.get_ifd(0x8825)[1] = "N"
    body = picture(kind="JPEG", exif=exif, quality=95)
    (tmp_path / "photo.jpg").write_bytes(body)
    zoomed = zoom_photos(
        [tmp_path / "photo.jpg"], tmp_path / "out", Zoomer.load(model), output=output, say=len, warn=len
    )
    answer = service.zoom(body, name="photo.jpg", **query)
    assert answer.status_code == 200, answer.text
    assert answer.content == zoomed[0].path.read_bytes()
    assert zoomed[0].path.name in answer.headers["content-disposition"]
    assert answer.headers["x-sdan-size"] == f"{zoomed[0].width}x{zoomed[0].height}"


def test_a_form_and_a_body_give_the_same(service):
    body = picture(seed=3)
    form = requests.post(f"{service.address}/zoom", files={"any": ("../My photo.png", body)}, timeout=120)
    assert form.content == service.zoom(body).content
    assert 'filename="My_photo_4x.png"' in form.headers["content-disposition"]


def test_raw_is_zoomed_and_previewed(service, tmp_path):
    body = dng(tmp_path / "photo.dng").read_bytes()
    answer = service.zoom(body, name="photo.dng", preview=True, id="raw-photo-1")
    assert opened(answer).size == (256, 192)
    assert service.get("/progress/raw-photo-1").json() == {"stage": "done", "share": 1.0, "preview": True}
    preview = Image.open(io.BytesIO(service.get("/preview/raw-photo-1").content))
    assert preview.size == (64, 48) and preview.format == "JPEG"
    refused(service.get("/preview/another-one"), 404)


@pytest.mark.parametrize("order", ["SIGSEGV", "SIGKILL"])
def test_a_crashing_decoder_costs_one_request(service, tmp_path, order):
    path = dng(tmp_path / "photo.dng")
    whole = path.read_bytes()
    answer = service.zoom(whole + f"ORDER:{order}".encode(), name="photo.dng")
    line = refused(answer, 422 if order == "SIGSEGV" else 503)
    assert "SIGSEGV" in line or answer.headers["retry-after"]
    for _ in range(SEATS):
        assert service.zoom(whole, name="photo.dng").status_code == 200


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"format": "gif"}, "format: expected png, jpg or tiff, got gif"),
        ({"format": "dng"}, "format: expected png, jpg or tiff, got dng"),
        ({"bits": 9}, "bits: expected 8 or 16, got 9"),
        ({"bits": "many"}, "bits: expected a valid integer, got 'many'"),
        ({"format": "jpg", "bits": 16}, "bits: expected 8 for a JPG, got 16; use format tiff or png"),
        ({"quality": 0}, "quality: expected 1 to 100, got 0"),
        ({"scale": 5}, "scale: expected 2, 3, 4 or 8, got 5"),
        ({"crop": "1,2"}, "crop: expected X,Y,W,H in pixels, got '1,2'; e.g. crop 0,0,400,300"),
        ({"strength": 2}, "strength: expected less than or equal to 1, got '2'"),
        ({"id": "a/b"}, "id: expected match pattern '^[A-Za-z0-9-]{8,64}$', got 'a/b'"),
    ],
)
def test_a_wrong_option_is_refused(service, query, expected):
    assert refused(service.zoom(picture(), **query), 400) == expected


def bomb(side):
    """A PNG of a few bytes that declares side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")


HOSTILE = {
    "empty": (b"", "", (400,)),
    "text": (b"hello, this is no photograph\n", "a.jpg", (415,)),
    "page": (b"<html><script>alert(1)</script>", "a.html", (415,)),
    "gif": (b"GIF89a" + bytes(100), "a.gif", (415,)),
    "zeros": (bytes(5000), "a.png", (415,)),
    "cut": (picture()[:300], "a.png", (422,)),
    "cut raw": (b"II*\x00\x08\x00\x00\x00" + bytes(500), "a.ARW", (422,)),
    "small bomb": (bomb(1400), "a.png", (413, 422)),
    "bomb": (bomb(30000), "a.png", (413, 422)),
    "large": (picture(1600, 1600), "a.png", (413,)),
    "name": (b"", "../../etc/passwd", (400,)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_upload_gets_one_line(service, case):
    body, name, codes = HOSTILE[case]
    line = refused(service.zoom(body, name=name), *codes)
    assert str(service.work) not in line
    if body:
        form = requests.post(f"{service.address}/zoom", files={"photo": (name, body)}, timeout=120)
        assert refused(form, *codes) == line
    assert service.get("/healthz").json()["status"] == "ok"
    assert list(service.work.iterdir()) == []


def test_too_many_bytes_are_refused(service):
    expected = "body: expected at most 4 MB, got more; reduce the photograph or crop it"
    parts = (bytes(100_000) for _ in range(60))  # its length is not declared
    assert refused(service.zoom(parts), 413) == expected
    declared = raw_request(service, b"POST /zoom HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999\r\n\r\nx")
    assert b" 413 " in declared and b"body: expected at most 4 MB, got 10000; reduce" in declared
    assert list(service.work.iterdir()) == []


def raw_request(service, data):
    """The first bytes of the answer to an incomplete request."""
    place = urlsplit(service.address)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall(data)
        return connection.recv(4096) + connection.recv(4096)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nbroken"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'),
    ],
)
def test_a_form_without_a_file_is_refused(service, kind, body):
    answer = requests.post(f"{service.address}/zoom", headers={"Content-Type": kind}, data=body, timeout=60)
    assert refused(answer, 400).startswith("form: expected one file, got ")


def test_a_slow_upload_is_ended(service, limited):
    limited(upload_s=1)
    answer = raw_request(service, b"POST /zoom HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf")
    assert b" 408 " in answer and b"upload: expected all of it within 1 s" in answer
    assert list(service.work.iterdir()) == []


def test_an_answer_that_takes_too_long_is_a_503(service, limited):
    limited(timeout_s=1)
    answer = service.zoom(picture(1100, 1100))
    assert "expected to be ready within 1 s" in refused(answer, 503) and int(answer.headers["retry-after"]) >= 1
    wait_until(lambda: list(service.work.iterdir()) == [])


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_small_photo_overtakes_a_large_one(service):
    """Health checks answer meanwhile, and the photographs take turns in the network."""
    ends = {}

    def send(name, side):
        assert service.zoom(picture(side, side), id=f"order-{name}").status_code == 200
        ends[name] = time.monotonic()

    large = threading.Thread(target=send, args=("large", 800))
    large.start()
    wait_until(lambda: '"zooming"' in service.get("/progress/order-large").text)
    send("small", 40)
    assert service.get("/healthz").json()["inside"] == 1
    large.join()
    assert ends["small"] < ends["large"]


def test_a_client_that_leaves_ends_its_work(service):
    """Ray Serve cancels the request's task then."""
    desk = service.app.state.desk
    path = desk.new_folder() / "photo.png"
    path.write_bytes(picture(1100, 1100))

    async def leave():
        with desk.place(None) as ticket:
            task = asyncio.create_task(desk.zoom(ticket, path, Wish(Output("png"))))
            while ticket.stage != "zooming":
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return ticket

    ticket = asyncio.run(leave())
    wait_until(lambda: list(service.work.iterdir()) == [])
    assert 0 < ticket.done < ticket.total and desk.inside == 0


def test_a_full_queue_is_a_503(service, limited):
    limited(queue=1)
    desk = service.app.state.desk
    desk.inside += 1 + SEATS
    try:
        answer = service.zoom(picture())
        expected = "queue: expected fewer than 1 waiting photographs, got 1 waiting; send it again later"
        assert refused(answer, 503) == expected and int(answer.headers["retry-after"]) >= 1
        assert service.get("/healthz").status_code == 200
    finally:
        desk.inside -= 1 + SEATS
    assert service.zoom(picture()).status_code == 200


def test_many_clients_lose_nothing(service):
    bodies = [picture(seed=number) for number in range(4)]
    expected = [service.zoom(body).content for body in bodies]
    lost = []

    def client(number):
        for turn in range(3):
            which = (number + turn) % len(bodies)
            answer = service.zoom(bodies[which])
            if answer.content != expected[which]:
                lost.append(answer.text)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert lost == [] and list(service.work.iterdir()) == []


def test_pages_of_other_sites_are_refused(service):
    answer = requests.post(f"{service.address}/zoom", data=b"x", headers={"Sec-Fetch-Site": "cross-site"}, timeout=60)
    refused(answer, 403)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_pages_load_nothing_from_elsewhere(service, path):
    answer = service.get(path)
    assert answer.status_code == 200 and "{{" not in answer.text
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|docs"|openapi|\./")([^"']+)""", answer.text) == []
    assert "://" not in answer.text and "url(" not in answer.text.split("<script>")[0]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy


def test_unknown_addresses_get_one_line(service):
    assert refused(service.get("/other"), 404).startswith("GET /other: expected POST /zoom, ")
    refused(service.get("/zoom"), 405)
    assert set(service.get("/openapi.json").json()["paths"]) == {"/zoom", "/healthz", "/progress/{id}"}


def register(tracking_uri, folder):
    registry.prepare_database(tracking_uri)
    run = registry.create_run(tracking_uri, registry.EXPERIMENT, folder.name)
    return registry.register_model(tracking_uri, run, folder)


def test_a_promotion_exchanges_the_model(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = registry.default_tracking_uri(tmp_path / "data")
    models = Models(tmp_path / "data", None)
    assert models.current.name == "starter and starter-rgb" and not models.refresh()
    first, second = (register(uri, write_model(tmp_path / name, seed)) for seed, name in enumerate(("one", "two")))
    registry.set_champion(uri, first)
    assert models.refresh() and models.current.name == f"sdan version {first}"
    used = models.current
    registry.set_champion(uri, second)
    assert models.refresh() and models.current.version == second and not models.refresh()
    assert used.version == first  # a request that began with it keeps it
    broken = register(uri, write_model(tmp_path / "three", 3))
    source = registry.resolve_model(uri, f"models:/sdan/{broken}")
    (source / "model.safetensors").write_bytes(b"damaged")
    registry.set_champion(uri, broken)
    assert not models.refresh() and not models.refresh() and models.current.version == second
    registry.rollback(uri)
    assert not models.refresh() and models.current.version == second
    assert not Models(tmp_path / "data", str(tmp_path / "one")).refresh()


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        (None, "photo"),
        ("", "photo"),
        ("..", "photo"),
        ("a b/c d.ARW", "c_d.ARW"),
        ("C:\\x\\Bild ä.jpeg", "Bild_.jpeg"),
        ("x" * 300 + ".tiff", "x" * 80 + ".tiff"),
        (".tif", "tif"),
        ('a"\r\nSet-Cookie: b.png', "a_Set-Cookie_b.png"),
    ],
)
def test_file_names_are_made_safe(name, safe):
    assert safe_name(name) == safe


@pytest.mark.parametrize("field", ["upload_mb", "megapixels", "queue", "timeout_s", "upload_s"])
def test_limits_below_one_are_refused(field):
    with pytest.raises(ServeError, match="expected at least 1, got 0"):
        Limits(**{field: 0})


def test_a_refusal_is_one_line_in_the_words_of_the_query():
    assert str(Refused(422, "-o /a/b.jpg: expected x;\nuse --format or --crop")) == "expected x; use format or crop"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"host": "example.org"}, "--host: expected an IP address of this machine or localhost, got example.org"),
        ({"host": "192.0.2.1"}, "--host: expected an address of this machine, got 192.0.2.1; use 127.0.0.1"),
        ({"port": 0}, "--port: expected 1 to 65535, got 0"),
        ({"model": "nowhere"}, "nowhere: expected a checkpoint folder, got none"),
    ],
)
def test_a_wrong_start_is_refused_before_ray(options, expected, tmp_path):
    arguments = {"host": "127.0.0.1", "port": 9999, "model": None} | options
    with pytest.raises(ValueError, match=re.escape(expected)):
        service_module.run(tmp_path, **arguments, limits=Limits(), say=print, warn=print)


def test_a_cluster_is_not_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ServeError, match=r"RAY_ADDRESS: expected none, .*, got 10\.0\.0\.1:6379; unset it"):
        service_module.run(tmp_path, None, host="127.0.0.1", port=9999, limits=Limits(), say=print, warn=print)


def test_a_wrong_limit_ends_the_command_in_one_line(tmp_path):
    command = [str(Path(sys.executable).with_name("sdan")), "serve", "--queue", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 2 and done.stderr == "sdan: --queue: expected at least 1, got 0\n"


def test_the_app_needs_no_ray():
    code = "import sys, pipelines.serving.app; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "False", done.stderr
