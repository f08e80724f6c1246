"""`sdan compare` with the real trainer: an adversarial row is trained, interrupted, continued and never registered."""

import pytest
from mlflow import MlflowClient
from stand_in import TINY

from pipelines import registry, train
from pipelines.comparing.verb import Options, compare
from pipelines.training import run_folder
from sdan import checkpoint
from sdan.baselines import SRResNet

ROW = "srgan"


@pytest.mark.slow
def test_an_interrupted_row_goes_on_from_its_checkpoint(tiny_shards, tmp_path, monkeypatch, vgg_weights):
    from safetensors.torch import save_file

    save_file(vgg_weights, tmp_path / "vgg.safetensors")
    # Wider borders make the discriminator's pictures small.
    options = Options(1, (ROW,), 3, (*TINY, "loss.border_px=48", "train.val_crops=1"), crops=1)
    data, out = tmp_path / "data", tmp_path / "out"

    def compared():
        return compare(
            str(tiny_shards), options, data=data, out=out, vgg_weights=tmp_path / "vgg.safetensors", say=print
        )

    finish = train._finish

    def interrupt(*arguments):
        monkeypatch.setattr(train, "_finish", finish)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compared()
    (folder,) = run_folder.all_runs(data)
    assert not run_folder.is_finished(folder) and run_folder.read_run(folder).features == "VGG19"
    result = compared()
    assert (result.finished, result.set_aside) == (1, {}) and "SRGAN, VGG19 (RGB)" in result.table
    model = checkpoint.load(folder / run_folder.MODEL)
    assert isinstance(model.model, SRResNet)
    assert run_folder.last_report(folder)["epoch"] == 3
    kept = [checkpoint.load_trainer_state(path) for path in folder.glob("checkpoint_*") if path.is_dir()]
    assert {state["crops"] for state in kept} >= {6} and all(state["adversary"] for state in kept)
    uri = registry.default_tracking_uri(data)
    assert MlflowClient(uri).search_registered_models() == []
    row = MlflowClient(uri).get_run(run_folder.read_run(folder).run_id)
    assert row.info.status == "FINISHED" and row.data.params["feature_network"] == "VGG19"
    assert {"train_discriminator", "self/raw_psnr"} <= {name.replace("train/", "train_") for name in row.data.metrics}
