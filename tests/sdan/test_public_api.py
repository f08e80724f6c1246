"""`import sdan`: what it offers, what importing it loads, and the example in the README."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_scene import WB, Scene, frame_to_scene, to_mosaic

import sdan
from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from sdan import checkpoint, inference, raw_input, starter_folder
from sdan.baselines import SRResNet
from sdan.resample import bicubic, low_pass

ROOT = Path(__file__).parents[2]
SMALL = sdan.SDANConfig(scale=2, features=4, blocks=1, packing_kernel=2, skip="rendering")
RUN = {"name": "test", "train": {"crop_px": 16}}


def python_example() -> str:
    """The README's code block that imports sdan."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if re.search(r"^import sdan$", block, re.MULTILINE)]
    assert len(found) == 1, f"README.md: expected one Python code block with `import sdan`, got {len(found)}"
    return found[0]


@pytest.fixture(scope="module")
def dng(tmp_path_factory):
    """A RAW file of 96x128 photosites."""
    size = (96, 128)
    path = tmp_path_factory.mktemp("raw") / "photo.dng"
    write_dng(path, to_mosaic(Scene(0).view(frame_to_scene(0.5, size), size)), wb=WB)
    return path


def test_the_readme_example_zooms_a_raw_file(dng):
    example = python_example()
    assert example.count("PHOTO.ARW") == 1
    names = {}
    exec(compile(example.replace("PHOTO.ARW", str(dng)), "README.md", "exec"), names)
    zoomed = names["zoomed"]
    assert zoomed.shape == (3, 4 * 96, 4 * 128) and zoomed.dtype == torch.float32
    assert zoomed.min() >= 0 and zoomed.max() <= 1
    rendering = torch.from_numpy(decode.load(dng).rendering).permute(2, 0, 1)[None] / 255
    low = low_pass(zoomed[None], 4)
    assert (low - rendering).abs().mean() < 0.05 < (low - rendering.flip(3)).abs().mean()  # the same photo
    assert (zoomed[None] - bicubic(rendering, 4)).abs().max() > 0.02  # from the network, not bicubic alone


def test_the_docstring_shows_the_readme_example():
    documented = [line.strip() for line in sdan.__doc__.splitlines()]
    assert [line for line in python_example().splitlines() if line not in documented] == []


UNWANTED = ("ray", "mlflow", "optuna", "lpips", "torchvision", "cv2", "rawpy", "PIL", "exifread", "pyarrow", "pandas")
USE = """
import sys, sdan, torch
model = sdan.load("starter")
sdan.zoom(model, torch.rand(4, 8, 8), torch.rand(3, 16, 16))
print(*(name for name in (*sys.argv[1:], "preprocessing", "pipelines", "tuning") if name in sys.modules))
"""


def test_import_load_and_zoom_need_only_torch_and_safetensors():
    command = [sys.executable, "-c", USE, *UNWANTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.split() == []


def test_the_starter_is_the_package_data_of_pipelines(monkeypatch, tmp_path):
    expected = checkpoint.load(starter_folder()).model.state_dict()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()  # a folder of this name does not hide it
    loaded = sdan.load("starter")
    assert not loaded.training and loaded.input_tile_px == 32
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("found", [None, "folder without the model"])
def test_a_missing_starter_is_one_line_with_the_remedy(monkeypatch, tmp_path, found):
    spec = None if found is None else type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(sdan, "find_spec", lambda name: spec)
    with pytest.raises(checkpoint.CheckpointError, match=r"starter: expected .* got none; install") as error:
        sdan.load("starter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", [sdan.SDAN, SRResNet])
@pytest.mark.parametrize(("kind", "input_tile_px"), [("mosaic", 32), ("packed", 16), ("rgb", 32), ("packed_rgb", 16)])
def test_a_loaded_folder_keeps_config_and_tile_size(tmp_path, architecture, kind, input_tile_px):
    config = replace(SMALL, input=kind)
    checkpoint.save(tmp_path / "model", architecture(config), config=RUN, scores={})
    loaded = sdan.load(tmp_path / "model")
    assert type(loaded) is architecture and loaded.config == config and not loaded.training
    assert loaded.input_tile_px == input_tile_px


@pytest.mark.parametrize("kind", ["mosaic", "packed"])
def test_zoom_arranges_packed_raw_for_the_model(kind):
    torch.manual_seed(0)
    model = sdan.SDAN(replace(SMALL, input=kind))
    torch.nn.init.normal_(model.super_resolution.last.weight, std=0.1)
    model.input_tile_px = 16
    raw, rendering = torch.rand(4, 9, 11), torch.rand(3, 18, 22)
    calls = []
    zoomed = sdan.zoom(model, raw, rendering, precision="fp32", progress=lambda *call: calls.append(call))
    x = raw if kind == "packed" else raw_input.packed_to_mosaic(raw[None])[0]
    assert torch.equal(zoomed, inference.zoom(model, x, rendering, input_tile_px=16, precision="fp32"))
    assert zoomed.shape == (3, 36, 44) and calls[-1][0] == calls[-1][1]
    parts = list(sdan.zoom_rows(model, raw, rendering, bits=16, precision="fp32"))
    assert torch.equal(torch.cat(parts, dim=1), (zoomed * 65535).round().to(torch.uint16))


def test_zoom_packs_an_rgb_picture_for_the_model():
    torch.manual_seed(0)
    model = sdan.SDAN(replace(SMALL, input="packed_rgb"))
    torch.nn.init.normal_(model.super_resolution.last.weight, std=0.1)
    model.input_tile_px = 16
    picture = torch.rand(3, 18, 22)
    zoomed = sdan.zoom(model, picture, picture, precision="fp32")
    assert zoomed.shape == (3, 36, 44)
    cells = picture.reshape(3, 9, 2, 11, 2).permute(0, 2, 4, 1, 3).reshape(12, 9, 11)
    assert torch.equal(zoomed, inference.zoom(model, cells, picture, input_tile_px=16, precision="fp32"))
    with pytest.raises(ValueError, match="raw: expected even height and width"):
        sdan.zoom(model, picture[:, :17], picture[:, :17])


def test_zoom_without_a_tile_size_is_refused():
    with pytest.raises(ValueError, match=r"model: expected a model from sdan\.load, got one without input_tile_px"):
        sdan.zoom(sdan.SDAN(SMALL), torch.rand(4, 8, 8), torch.rand(3, 16, 16))
    with pytest.raises(ValueError, match=r"model: expected a model from sdan\.load"):  # before the first row
        sdan.zoom_rows(sdan.SDAN(SMALL), torch.rand(4, 8, 8), torch.rand(3, 16, 16))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda picture: picture.numpy(), r"expected a torch\.Tensor, got numpy\.ndarray"),
        (lambda picture: (255 * picture).byte(), r"expected floating point values, got torch\.uint8"),
        (lambda picture: 255 * picture, r"expected values in \[0, 1\], got .* to 25\d"),
        (lambda picture: picture.where(picture > 0.1, torch.nan), r"expected values in \[0, 1\], got nan"),
    ],
)
def test_zoom_refuses_another_type_or_range(wrong, said):
    model = sdan.SDAN(SMALL)
    model.input_tile_px = 16
    generator = torch.Generator().manual_seed(0)
    raw, rendering = torch.rand(4, 16, 16, generator=generator), torch.rand(3, 32, 32, generator=generator)
    for pictures, name in (((wrong(raw), rendering), "raw"), ((raw, wrong(rendering)), "rendering")):
        with pytest.raises(ValueError, match=f"zoom, {name}: {said}"):
            sdan.zoom(model, *pictures)


@pytest.mark.parametrize(("kind", "channels"), [("mosaic", 4), ("packed", 4), ("rgb", 3), ("packed_rgb", 3)])
def test_zoom_refuses_raw_in_another_layout(kind, channels):
    model = sdan.SDAN(replace(SMALL, input=kind))
    model.input_tile_px = 16
    for raw in (torch.rand(1, 16, 16), torch.rand(1, channels, 8, 8)):
        with pytest.raises(ValueError, match=rf"raw: expected \[{channels},h,w\] for input='{kind}', got"):
            sdan.zoom(model, raw, torch.rand(3, 16, 16))


def test_from_photo_normalises_and_keeps_the_orientation(dng):
    photo = decode.load(dng)
    raw, rendering = raw_input.from_photo(photo)
    counts = torch.from_numpy(photo.packed).float()
    black, wb = torch.from_numpy(photo.black_level), torch.from_numpy(photo.wb)
    expected = (counts - black[:, None, None]) / (photo.white_level - black[:, None, None]) * wb[:, None, None]
    torch.testing.assert_close(raw, expected.clamp(0, 1))
    assert rendering.shape == (3, 96, 128) and rendering.dtype == torch.float32
    assert torch.equal((rendering * 255).round().byte().permute(1, 2, 0), torch.from_numpy(photo.rendering))
    assert 0.05 < raw.mean() < 0.95 and 0.05 < rendering.mean() < 0.95
