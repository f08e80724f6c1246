"""`sdan demo` at its smallest: every stage runs, the pictures exist, and a second demo keeps the sequences."""

from functools import partial

import cv2
import numpy as np
import pytest
import torch

from pipelines import demo, registry
from pipelines.zoom import read_photo
from preprocessing.shards import PreprocessOptions
from sdan import SDANConfig
from sdan.resample import bicubic

pytestmark = pytest.mark.slow

SIZE = demo.Size("demo", sequences=3, held_out=("00003",), epochs=1, crops=2)
SMALLEST = {
    "train.crops_per_epoch": 4,
    "train.crop_px": 16,
    "train.batch_per_worker": 2,
    "train.val_crops": 2,
    "train.learning_rate": 5e-5,
}


@pytest.fixture(scope="module")
def small():
    """The demo with three sequences of 640 pixels, one epoch of four crops and one worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "OPTIONS", PreprocessOptions(scale=4, tile_px=32, stride_px=16))
        patch.setattr(demo, "FINE_TUNING", SMALLEST)
        patch.setattr(demo, "simulate", partial(demo.simulate, width_px=640))
        patch.setattr("pipelines.cluster.workers_that_fit", lambda most: 1)
        yield


@pytest.fixture(scope="module")
def first(small, tmp_path_factory):
    """(data folder, console lines, result) of one demo."""
    data, said = tmp_path_factory.mktemp("demo"), []
    return data, said, demo.run(data, say=said.append, size=SIZE)


def sequences(data):
    """path -> (time of the last change, bytes) of every file of the simulated sequences."""
    files = [path for path in (data / "demo" / "raw").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_each_stage_is_announced(first):
    _, said, _ = first
    stages = [line for line in said if not line.startswith(" ")]
    assert [line.split()[:2] for line in stages] == [
        ["1/5", "simulate:"],
        ["2/5", "preprocess"],
        ["3/5", "train:"],
        ["4/5", "evaluate"],
        ["5/5", "zoom"],
    ]
    assert any("9 pairs written, 0 finished earlier, 0 set aside" in line for line in said)


def test_the_pictures_exist_and_show_the_photograph(first):
    data, _, result = first
    folder = data / "demo" / "pictures"
    assert result.pictures == [folder / name for name in ("examples.png", "zoom_centre.png", "zoomed_4x.png")]
    examples, strip, full = (cv2.imread(str(path)) for path in result.pictures)
    assert len(np.unique(examples)) > 50
    photo = read_photo(data / "demo" / "raw" / "00003" / "00005.dng", SDANConfig(input="packed"))
    plain = bicubic(photo.rendering[None], 4)[0].clamp(0, 1).permute(1, 2, 0)
    assert full.shape == tuple(plain.shape)
    zoomed = torch.from_numpy(full[..., ::-1].copy()) / 255
    # The network adds detail to the bicubic rendering: it differs, but far less than a mirror image does.
    assert 0.001 < (zoomed - plain).abs().mean() < 0.3 * (zoomed.flip(1) - plain).abs().mean()
    top, left = (full.shape[0] - 640) // 2, (full.shape[1] - 640) // 2
    assert np.array_equal(strip[-648:-8, -648:-8], full[top : top + 640, left : left + 640])


def test_the_summary_names_pictures_model_and_scores(first):
    data, _, result = first
    text = demo.summary(result, data)
    for path in result.pictures:
        assert f"picture: {path}" in text
    assert f"sdan zoom PHOTO -o zoomed.png --model {result.training.model}" in text
    assert result.evaluation.table() in text
    assert f"true {result.starter.rows['SDAN (self)']['true_psnr']:.2f} dB" in text
    assert result.training.model.is_dir()
    uri = registry.default_tracking_uri(data)
    assert registry.get_champion(uri) is None  # kept apart from models of real photographs
    # So few crops need not improve the starter model; then nothing is registered, and the summary says so.
    champion = registry.get_champion(uri, demo.REGISTERED)
    assert (champion is not None) == (result.training.verdict.fault is None)


def test_a_second_demo_keeps_sequences_and_shards(first):
    data, _, result = first
    before, said = sequences(data), []
    again = demo.run(data, say=said.append, size=SIZE)
    assert sequences(data) == before and len(before) > 0
    assert any("0 pairs written, 9 finished earlier" in line for line in said)
    assert again.training.name != result.training.name
    assert again.starter.rows == result.starter.rows
