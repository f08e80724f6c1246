"""Checkpoints: round trips, safe replacement, and a one-line error for every damaged file."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdan import checkpoint
from sdan.baselines import SRResNet
from sdan.checkpoint import CheckpointError, load, load_trainer_state, save
from sdan.network import SDAN, SDANConfig

SMALL = SDANConfig(input="packed", scale=2, features=4, blocks=1, packing_kernel=2, skip="rendering")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return save(tmp_path / "run" / "best", SDAN(SMALL), config={"name": "test"}, scores={"psnr": 30.5})


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("architecture", [SDAN, SRResNet])
def test_a_round_trip_keeps_weights_config_and_scores(tmp_path, architecture):
    torch.manual_seed(0)
    model = architecture(SMALL)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    config = {"name": "r", "model": {"scale": 2}, "loss": {"kind": "l1"}, "shard_schema": 1}
    save(tmp_path / "c", model, config=config, scores={"psnr": 31.25, "steps": 7}, commit="abc123")
    found = load(tmp_path / "c")
    assert type(found.model) is architecture and found.model.config == SMALL and not found.model.training
    assert found.config == config and found.scores == {"psnr": 31.25, "steps": 7} and found.commit == "abc123"
    assert found.versions["torch"] == torch.__version__.split("+")[0] or found.versions["torch"] == torch.__version__
    for name, value in model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name])
    x, reference, rendering = torch.rand(1, 4, 8, 8), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x, reference, rendering).zoomed, found.model(x, reference, rendering).zoomed)


def test_the_codes_commit_is_stored_unless_one_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "code_commit", lambda: "def456")
    assert load(save(tmp_path / "c", SDAN(SMALL), config={}, scores={})).commit == "def456"
    assert load(save(tmp_path / "c", SDAN(SMALL), config={}, scores={}, commit="abc123")).commit == "abc123"


def test_the_files_are_plain_and_readable_by_every_user(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert folder.stat().st_mode & 0o055 == 0o055
    described = json.loads((folder / "config.json").read_text())
    assert described["format"] == 1 and described["network"]["input"] == "packed"
    assert list(folder.parent.iterdir()) == [folder]  # no temporary folder left


def test_trainer_state_comes_back_exactly(tmp_path):
    model = SDAN(SMALL)
    optimizer = torch.optim.Adam(model.parameters())
    state = {"optimizer": optimizer.state_dict(), "step": 12, "best": float("-inf"), "rng": torch.get_rng_state()}
    save(tmp_path / "c", model, config={}, scores={}, trainer_state=state)
    found = load_trainer_state(tmp_path / "c")
    assert found["step"] == 12 and found["best"] == float("-inf") and torch.equal(found["rng"], state["rng"])
    optimizer.load_state_dict(found["optimizer"])


def test_saving_again_replaces_the_whole_checkpoint(folder):
    save(folder, SDAN(SMALL), config={"name": "first"}, scores={}, trainer_state={"step": 1})
    bigger = replace(SMALL, features=6)
    save(folder, SDAN(bigger), config={"name": "second"}, scores={"psnr": float("nan")})
    found = load(folder)
    assert found.model.config == bigger and found.config == {"name": "second"} and found.scores == {"psnr": None}
    assert not (folder / "trainer.pt").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_a_save_that_fails_leaves_the_old_checkpoint(folder, monkeypatch):
    before = load(folder).scores

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"expected a writable folder, got .*No space left.*; free space"):
        save(folder, SDAN(SMALL), config={}, scores={"psnr": 1.0})
    assert load(folder).scores == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_save_killed_between_the_two_renames_loses_nothing(folder):
    folder.rename(folder.with_name(".best.replaced"))
    assert load(folder).scores == {"psnr": 30.5}
    save(folder, SDAN(SMALL), config={}, scores={"psnr": 31.0})
    assert load(folder).scores == {"psnr": 31.0}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="got other files"):
        save(tmp_path / "photos", SDAN(SMALL), config={}, scores={})
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


def test_an_unwritable_folder_and_a_wrong_model_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected a writable folder, got .*; choose another"):
        save(tmp_path / "file" / "c", SDAN(SMALL), config={}, scores={})
    with pytest.raises(CheckpointError, match="expected a model of type SDAN or SRResNet, got Linear"):
        save(tmp_path / "c", torch.nn.Linear(1, 1), config={}, scores={})


def test_missing_folders_and_files_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="got none") as error:
        load(tmp_path / "none")
    one_line(error)
    with pytest.raises(CheckpointError, match=r"trainer\.pt: expected a trainer state"):
        load_trainer_state(folder)
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a checkpoint's file, got none;") as error:
        load(folder)
    one_line(error)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: expected a checkpoint's file, got No such file"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"expected weights, got .*; copy the checkpoint again") as error:
        load(folder)
    one_line(error)


def test_weights_of_another_network_are_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "head.bias"}, path)
    with pytest.raises(CheckpointError, match=r"got 1 that differ; head\.bias: expected \(4,\), got none") as error:
        load(folder)
    one_line(error)
    save_file(weights | {"head.bias": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match=r"expected \(4,\), got \(5,\)"):
        load(folder)
    save_file(weights | {"more": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match=r"more: expected none, got \(5,\)"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "written by a newer SDAN"),
        ({"format": "1"}, "no format number"),
        ({"architecture": "os.system"}, "expected a network's description, got architecture 'os.system'"),
        ({"architecture": ["SDAN"]}, "got architecture of type list"),
        ({"network": {"scale": 3}}, "scale: expected one of"),
        ({"network": {"colour": 3}}, "SDANConfig: expected known values, got .*colour"),
        ({"network": None}, "expected a network's description, got network of type NoneType"),
        ({"network": {"features": 10**5}}, "features: expected a whole number from 1 to 1024"),
        ({"network": {"blocks": 10**9}}, "blocks: expected a whole number from 1 to 256"),
        ({"network": {"features": "4"}}, "features: expected a whole number"),
        ({"config": []}, "got config of type list"),
        ({"config": {"train": {"crop_px": 10**9}}}, "crop_px: expected 1 to"),
        ({"scores": 3}, "got scores of type int"),
        ({"weights_sha256": 3}, "got weights_sha256 of type int"),
    ],
)
def test_wrong_descriptions_are_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[1, 2", b"[1]", b"7", b"null", b"\x00\xff", bytes(range(256)), b"[" * 10**6),
        *('{"format": 1}'.encode("utf-16"), b" " * 16_000_001),
    ],
    ids=lambda content: repr(content[:8]),
)
def test_descriptions_that_are_not_json_are_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        load(folder)
    one_line(error)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_loading_never_runs_code_from_a_pickle(folder, tmp_path):
    created = tmp_path / "created"
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"step": Payload(created)}, folder / "trainer.pt")
        with pytest.raises(CheckpointError, match="expected tensors and plain values, got") as error:
            load_trainer_state(folder)
        one_line(error)
        assert not created.exists()
    (folder / "trainer.pt").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(CheckpointError, match="expected tensors and plain values, got"):
        load_trainer_state(folder)
    torch.save([1, 2], folder / "trainer.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary, got list"):
        load_trainer_state(folder)


def test_older_models_take_renderings_with_bt709s_curve(folder):
    path = folder / checkpoint.DESCRIPTION
    described = json.loads(path.read_text())
    assert described["network"].pop("rendering_curve") == "srgb" == SDANConfig().rendering_curve
    path.write_text(json.dumps(described))
    assert checkpoint.load(folder).model.config.rendering_curve == "bt709"


@pytest.mark.parametrize("bit", [0, 7, 8191])
def test_one_flipped_bit_in_the_weights_is_refused(folder, bit):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected the weights that .*copy") as error:
        load(folder)
    one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_digest", [True, False])
def test_weights_that_are_not_finite_are_refused(folder, value, with_digest):
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"][1] = value
    save_file(weights, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    if not with_digest:
        del described["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"expected finite weights, got NaN or infinity in head\.bias") as error:
        load(folder)
    one_line(error)


def test_checkpoints_without_a_digest_are_read(folder):
    described = json.loads((folder / "config.json").read_text())
    assert described.pop("weights_sha256") == checkpoint.weights_digest(load_file(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(described))
    assert load(folder).scores == {"psnr": 30.5}


def test_large_networks_are_refused_before_they_are_built(folder, monkeypatch):
    described = json.loads((folder / "config.json").read_text())
    described["network"] |= {"features": 1024, "blocks": 256}
    (folder / "config.json").write_text(json.dumps(described))
    built = []
    monkeypatch.setitem(checkpoint.ARCHITECTURES, "SDAN", lambda config: built.append(meta()) or SDAN(config))

    def meta():
        return torch.empty(0).device.type

    with pytest.raises(CheckpointError, match=r"expected the weights of the network in config\.json, got"):
        load(folder)
    assert built == ["meta"]
