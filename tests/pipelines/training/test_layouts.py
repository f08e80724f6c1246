"""Which maps a training step on a GPU converts between channels-last and contiguous memory.

The step runs on the CPU. A dispatch mode gives each result the layout that it has on a GPU (torch 2.11 to 2.14).
"""

import importlib
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from training_steps import synthetic_inputs

from pipelines import config as configs
from pipelines.training import step
from sdan import network, resample
from sdan.network import SDAN, SDANConfig
from sdan.ops import narrow_conv

aten = torch.ops.aten
upsampling = importlib.import_module("sdan.ops.upsampling.conv_shuffle")
CHANNELS_LAST = torch.channels_last


def layout(tensor):
    """channels_last, contiguous, or None if it is both or neither."""
    last, contiguous = tensor.is_contiguous(memory_format=CHANNELS_LAST), tensor.is_contiguous()
    return None if last == contiguous else "channels_last" if last else "contiguous"


class LikeCuda(TorchDispatchMode):
    """Layouts as on CUDA; `conversions` lists (operator, channels) of contiguous maps that meet channels-last ones."""

    NOT_MAPS: ClassVar = (aten._unsafe_view, aten.empty_like)

    def __init__(self):
        super().__init__()
        self.conversions, self.maps = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        wanted = None
        if packet in (aten.convolution, aten.convolution_backward):
            first = 0 if packet is aten.convolution else 1
            pair = args[first : first + 2]  # cuDNN computes in channels-last if the input or the weight is
            wanted = CHANNELS_LAST if any(map(suggests_channels_last, pair)) else torch.contiguous_format
        elif packet in (aten.pixel_shuffle, aten.pixel_unshuffle):
            wanted = torch.contiguous_format
        if wanted is not None:
            out = tree_map(lambda a: a.contiguous(memory_format=wanted) if is_map(a) else a, out)
        if not function.is_view and packet not in self.NOT_MAPS:
            self.note(packet, [a for a in tree_leaves((args, kwargs)) if is_map(a)], tree_leaves(out))
        return out

    def note(self, packet, inputs, outputs):
        maps = [*inputs, *(a for a in outputs if is_map(a))]
        self.maps += [(a.shape[1], layout(a)) for a in outputs if is_map(a)]
        ours = str(packet).startswith("sdan.")  # they read offsets, which are contiguous, beside the maps
        if len({layout(a) for a in maps} - {None}) > 1 and not ours:
            contiguous = max(a.shape[1] for a in maps if layout(a) == "contiguous")
            self.conversions.append((str(packet), contiguous))


def suggests_channels_last(tensor):
    return torch._prims_common.suggest_memory_format(tensor) == CHANNELS_LAST


def is_map(value):
    return isinstance(value, torch.Tensor) and value.dim() == 4 and min(value.shape[2:]) > 3


def on_gpu(monkeypatch):
    """Take a GPU's way wherever the code asks for one."""
    monkeypatch.setattr(upsampling, "_keeps_channels_last", lambda x: x.is_contiguous(memory_format=CHANNELS_LAST))
    monkeypatch.setattr(upsampling, "runs_eagerly", lambda x: True)
    monkeypatch.setattr(narrow_conv, "_as_product", lambda input, weight: True)
    monkeypatch.setattr(network, "as_picture", lambda a: a.to(torch.float32, memory_format=torch.contiguous_format))
    monkeypatch.setattr(network, "bicubic", resample._bicubic_by_matrices)


@pytest.mark.parametrize("name", ["paper_4x", "srraw_4x"])
def test_only_pictures_change_their_layout(name, monkeypatch):
    """Maps of at least `features` channels never do, and pictures of 12 or 3 channels do it a few times."""
    on_gpu(monkeypatch)
    config = getattr(configs, name)()
    config = replace(
        config,
        model=replace(config.model, features=16, blocks=2, packing_kernel=4),
        loss=replace(config.loss, border_px=4),
        train=replace(config.train, crop_px=4),
    )
    model = SDAN(config.model).to(memory_format=CHANNELS_LAST)
    torch.nn.init.normal_(model.super_resolution.last.weight, std=0.1)  # it starts at 0 in srraw_4x
    inputs = synthetic_inputs(config, 2, torch.device("cpu"))
    with LikeCuda() as mode:
        with torch.autocast("cpu", torch.bfloat16):
            loss = step.training_loss(model, inputs, config.loss)["loss"]
        loss.backward()
    wide = [number for number, (channels, _) in enumerate(mode.maps) if channels >= 16]
    assert len(wide) > 40
    assert {mode.maps[number][1] for number in wide} <= {"channels_last", None}
    assert [name for name, channels in mode.conversions if channels >= 16] == []
    assert len(mode.conversions) <= 6, mode.conversions


def test_a_shuffle_of_pytorchs_would_convert(monkeypatch):
    """The mode sees what it should: with F.pixel_shuffle the maps behind it are contiguous."""
    on_gpu(monkeypatch)
    monkeypatch.setattr(upsampling, "_keeps_channels_last", lambda x: False)
    model = SDAN(SDANConfig(scale=2, features=16, blocks=1, packing_kernel=4)).to(memory_format=CHANNELS_LAST)
    with LikeCuda() as mode:
        model(torch.rand(1, 1, 8, 8), torch.rand(1, 3, 8, 8))
    assert [name for name, channels in mode.conversions if channels >= 16] == ["aten.pixel_shuffle", "aten.convolution"]
