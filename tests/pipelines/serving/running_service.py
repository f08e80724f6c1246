"""The service in this process, without Ray: uvicorn in a thread, on a free port of 127.0.0.1."""

import contextlib
import io
import threading
import time

import numpy as np
import requests
import torch
import uvicorn
from PIL import Image

from pipelines import config as configs
from pipelines.serving.app import create_app
from pipelines.serving.limits import Limits
from preprocessing.raw.dng import write_dng
from sdan import checkpoint, raw_input
from sdan.network import SDAN


class Service:
    """Sends requests to a running service."""

    def __init__(self, address, app):
        self.address, self.app = address, app

    def zoom(self, body, **query):
        return requests.post(f"{self.address}/zoom", data=body, params=query, timeout=120)

    def get(self, path):
        return requests.get(f"{self.address}{path}", timeout=60)


@contextlib.contextmanager
def running(models, folder, **limits):
    """A Service that ends with the context."""
    app = create_app(models, Limits(**limits), folder)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Service(f"http://127.0.0.1:{port}", app)
    finally:
        server.should_exit = True
        thread.join(20)


def write_model(folder, seed=0, **changes):
    """A checkpoint of an untrained network, whose output is bicubic enlargement."""
    torch.manual_seed(seed)
    config = configs.smoke()
    return checkpoint.save(folder, SDAN(config.model), config=configs.to_dict(config), scores={})


def picture(height=40, width=56, seed=0, kind="PNG", **options):
    """The bytes of a small picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(answer):
    """The picture in an answer."""
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    return image


def dng(path, height=48, width=64):
    """Write a small RAW; returns its path."""
    image = Image.open(io.BytesIO(picture(height, width)))
    packed = raw_input.mosaic_from_srgb(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    mosaic = 512 + 15000 * raw_input.packed_to_mosaic(packed)[0, 0].numpy()
    write_dng(path, mosaic.round().astype(np.uint16), wb=(1.0, 1.0, 1.0))
    return path
