"""The exported module equals `inference.zoom`, and so do the ONNX and pt2 files, for tiles of any size."""

import onnx
import onnxruntime
import pytest
import torch
from test_inference import photo, trained

from sdan import inference
from sdan.baselines import SRResNet
from sdan.export import METADATA, ExportError, TileZoom, blend, starts, trace, write_onnx, write_pt2
from sdan.network import SDANConfig
from sdan.tiles import cover

SMALL = SDANConfig(scale=2, features=8, blocks=1, packing_kernel=4, skip="rendering")
TILE = {"packed_rgb": 16, "rgb": 24, "packed": 16, "mosaic": 24}
"""Side of the windows, pixels of x."""


def network(**values):
    model = trained(SDANConfig(**{**SMALL.__dict__, **values}))
    model.input_tile_px = TILE[model.config.input]
    return model


def zoomed(model, x, rendering, monkeypatch):
    """`inference.zoom` with the second pass in one tile: at the borders of its tiles the network sees zeros."""
    monkeypatch.setattr(inference, "TILE_PX", 10_000)
    return inference.zoom(model, x, rendering, input_tile_px=model.input_tile_px, precision="fp32")


def inputs_of(model, x, rendering):
    if model.config.is_rgb:
        return (rendering[None],)
    raw = torch.nn.functional.pixel_unshuffle(x[None], 2) if model.config.input == "mosaic" else x[None]
    return raw, rendering[None]


@pytest.mark.parametrize(
    "values",
    [
        {"input": "packed_rgb", "tones": "kept", "upsampling": "direct"},
        {"input": "packed", "tones": "kept", "encoding": "sqrt", "upsampling": "direct"},
        {"input": "mosaic"},
        {"input": "rgb", "skip": "none", "flips": False, "attention": "channel"},
    ],
    ids=lambda values: values["input"],
)
@pytest.mark.parametrize("size", [(26, 26), (50, 38), (66, 112)])
def test_the_module_equals_zoom(values, size, monkeypatch):
    model = network(**values)
    x, rendering = photo(model.config, *size)
    with torch.no_grad():
        got = TileZoom(model)(*inputs_of(model, x, rendering))[0]
    want = zoomed(model, x, rendering, monkeypatch)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5


def test_the_windows_see_what_they_were_trained_on():
    """On one window as large as the tile the attention gives another picture."""
    module = TileZoom(network(input="packed_rgb"))
    (picture,) = module.example(96, 96)
    with torch.no_grad():
        small = module(picture)
        module.tile_px = 48
        large = module(picture)
    assert (small - large).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "step"), [(16, 16, 4, 1), (40, 16, 3, 1), (53, 16, 6, 1), (64, 24, 5, 2)]
)
def test_windows_lie_and_weigh_as_tiles_do(side, tile, overlap, step):
    tiling = cover((side, side), (tile, tile), overlap, step=step)
    found = starts(side, tile, overlap, step)
    assert found.tolist() == tiling.tops
    matrix = blend(found, side, tile, overlap).view(len(found), tile, side)
    for number, (start, weights) in enumerate(zip(tiling.tops, tiling.row_weights, strict=True)):
        want = torch.zeros(tile, side)
        want[torch.arange(tile), torch.arange(tile) + start] = weights
        assert torch.allclose(matrix[number], want, atol=1e-6)


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory):
    """(the model, its ONNX file, its pt2 file)."""
    model = network(input="packed_rgb", tones="kept", upsampling="direct", features=4)
    module, folder = TileZoom(model), tmp_path_factory.mktemp("exported")
    program = trace(module)
    write_onnx(program, folder / "model.onnx", module.metadata(), module.inputs)
    write_pt2(program, folder / "model.pt2", module.metadata())
    return model, folder / "model.onnx", folder / "model.pt2"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(33, 34), (64, 90), (97, 75)])
def test_both_files_equal_zoom_at_any_size(size, picture_files, monkeypatch):
    model, onnx_file, pt2_file = picture_files
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(3, *size, generator=generator)
    even = torch.nn.functional.pad(picture[None], (0, size[1] % 2, 0, size[0] % 2), mode="replicate")[0]
    want = zoomed(model, torch.nn.functional.pixel_unshuffle(even[None], 2)[0], even, monkeypatch)
    want = want[:, : 2 * size[0], : 2 * size[1]].numpy()
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    assert abs(session.run(["output"], {"input": picture[None].numpy()})[0][0] - want).max() < 1e-4
    with torch.no_grad():
        assert abs(torch.export.load(pt2_file).module()(picture[None])[0].numpy() - want).max() < 1e-4


@pytest.mark.slow
def test_an_onnx_file_says_what_it_is(picture_files):
    _, path, pt2 = picture_files
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("input", [1, 3, "height", "width"])
    assert (output.name, output.shape[:2]) == ("output", [1, 3])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["scale"] == "2" and metadata["curve"] == "srgb" and metadata["min_side_px"] == "33"
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    kinds = {node.op_type for node in graph.graph.node}
    assert {"Conv", "GridSample"} <= kinds and all(node.domain == "" for node in graph.graph.node)
    extra = {METADATA: ""}
    torch.export.load(pt2, extra_files=extra)
    assert '"scale": "2"' in extra[METADATA]


@pytest.mark.slow
def test_darktable_can_fix_the_tile_in_advance(picture_files):
    """darktable sets the open sides by their names before it loads the graph."""
    _, path, _ = picture_files
    options = onnxruntime.SessionOptions()
    for name in ("height", "width"):
        options.add_free_dimension_override_by_name(name, 64)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 64, 64]
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)).numpy()
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert abs(session.run(None, {"input": picture})[0] - plain.run(None, {"input": picture})[0]).max() < 1e-6


@pytest.mark.slow
def test_a_raw_model_has_two_named_inputs(tmp_path, monkeypatch):
    model = network(input="packed", tones="kept", encoding="sqrt")
    module = TileZoom(model)
    write_onnx(trace(module), tmp_path / "raw.onnx", module.metadata(), module.inputs)
    session = onnxruntime.InferenceSession(tmp_path / "raw.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["raw", "rendering"]
    assert session.get_inputs()[0].shape == [1, 4, "half_height", "half_width"]
    for size in ((17, 20), (40, 33)):
        x, rendering = photo(model.config, *size)
        got = session.run(None, {"raw": x[None].numpy(), "rendering": rendering[None].numpy()})[0][0]
        assert abs(got - zoomed(model, x, rendering, monkeypatch).numpy()).max() < 1e-4


def test_a_model_that_cannot_be_exported_says_why():
    with pytest.raises(
        ExportError, match=r"^model: expected a checkpoint with the size of its training crops, got none"
    ):
        TileZoom(SRResNet(SMALL))
    model = network(input="packed_rgb", offset="per_point")
    with pytest.raises(ExportError, match=r"^model: expected offset=squared, got per_point"):
        TileZoom(model)
