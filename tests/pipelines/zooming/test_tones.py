"""`sdan zoom` with the packaged models keeps tones: greys and saturated colours, as PNG, as JPG and as RAW."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.zoom import zoom_with
from pipelines.zooming.models import Chosen
from pipelines.zooming.request import DEFAULTS
from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from sdan import STARTER, STARTER_RGB, raw_input, starter_folder

PATCH_PX = 64
TONES = [(level,) * 3 for level in (0, 32, 64, 128, 192, 255)] + [
    (200, 40, 40), (40, 160, 60), (40, 70, 190), (220, 200, 40), (190, 60, 160), (40, 170, 190)]  # fmt: skip


def patches(picture, scale):
    """[tones, 3]: means over the inner half of each patch."""
    half, means = PATCH_PX * scale // 4, []
    for number in range(len(TONES)):
        top, left = ((place * PATCH_PX * scale) for place in divmod(number, 6))
        inner = picture[top + half : top + 3 * half, left + half : left + 3 * half]
        means.append(inner.reshape(-1, 3).mean(axis=0))
    return np.array(means)


def write_chart(path):
    """Write the patches, two rows of six, as a PNG, JPG or DNG; return them as a viewer shows them, uint8."""
    chart = np.kron(np.array(TONES, np.uint8).reshape(2, 6, 3), np.ones((PATCH_PX, PATCH_PX, 1), np.uint8))
    if path.suffix == ".dng":
        packed = raw_input.mosaic_from_srgb(torch.from_numpy(chart).permute(2, 0, 1)[None] / 255)
        mosaic = 512 + 15000 * raw_input.packed_to_mosaic(packed)[0, 0].numpy()
        write_dng(path, mosaic.round().astype(np.uint16), wb=(1.0, 1.0, 1.0))
        return decode.load(path).rendering
    Image.fromarray(chart).save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("name", ["chart.png", "chart.jpg", "chart.dng"])
def test_zoom_keeps_greys_and_saturated_colours(name, tmp_path):
    before = patches(write_chart(tmp_path / name), 1)
    chosen = Chosen(starter_folder(STARTER), starter_folder(STARTER_RGB))
    zoom_with(chosen, [tmp_path / name], tmp_path / "out.png", strength=1.0, output=DEFAULTS, say=print, warn=print)
    after = patches(cv2.imread(str(tmp_path / "out.png"))[..., ::-1].astype(float), 4)
    moved = np.abs(after - before)
    assert moved.mean() < 1 and moved.max() < 4
    assert moved[:6].max() < 1.5  # greys
