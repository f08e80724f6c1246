"""Which model zooms RAW and which zooms pictures."""

from dataclasses import replace

import pytest
import torch

from pipelines import config as configs
from pipelines import registry
from pipelines.zooming.models import choose_models
from sdan import SDAN, STARTER, STARTER_RGB, checkpoint, starter_folder

STARTERS = (starter_folder(STARTER), starter_folder(STARTER_RGB))


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def saved(folder, **changes):
    torch.manual_seed(0)
    config = configs.smoke()
    config = replace(config, model=replace(config.model, **changes))
    return checkpoint.save(folder, SDAN(config.model), config=configs.to_dict(config), scores={})


def test_without_a_champion_both_starters_are_chosen(tmp_path):
    chosen = choose_models(tmp_path, None)
    assert (chosen.for_raw, chosen.for_pictures) == STARTERS and "no champion" in chosen.note
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [STARTER, STARTER_RGB, "own"])
def test_a_named_model_zooms_everything(name, tmp_path):
    folder = saved(tmp_path / "own")
    expected = folder if name == "own" else starter_folder(name)
    chosen = choose_models(tmp_path / "data", str(folder) if name == "own" else name)
    assert chosen.for_raw == chosen.for_pictures == expected and not chosen.note


CHAMPIONS = (
    ({}, None, 1, "pictures: the champion reads RAW; zoomed with starter-rgb"),
    ({"input": "packed_rgb"}, 0, None, "RAW: the champion does not read RAW; zoomed with starter"),
    ({"scale": 8}, None, None, ""),
    ({"input": "rgb", "scale": 8}, None, None, ""),
)


def test_the_other_kind_gets_a_starter_of_the_same_scale(tmp_path):
    uri = registry.default_tracking_uri(tmp_path)
    registry.prepare_database(uri)
    for number, (changes, raw, pictures, said) in enumerate(CHAMPIONS):
        run_id = registry.create_run(uri, "sdan", f"run{number}")
        folder = saved(tmp_path / f"model{number}", **changes)
        registry.set_champion(uri, registry.register_model(uri, run_id, folder))
        champion = registry.resolve_model(uri, registry.CHAMPION_URI)
        chosen = choose_models(tmp_path, None)
        assert chosen.for_raw == (champion if raw is None else STARTERS[raw])
        assert chosen.for_pictures == (champion if pictures is None else STARTERS[pictures])
        notes = {"RAW": chosen.raw_note, "pictures": chosen.picture_note}
        assert [f"{kind}: {note}" for kind, note in notes.items() if note] == ([said] if said else [])
