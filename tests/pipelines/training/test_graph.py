"""A recorded step equals the step: with changing rates, skipped batches and a restored checkpoint; what is refused.

`Recorder` stands in for a CUDA graph on the CPU. It replays the same operators on the same tensors without running any
Python of the step again, so values that Python computed while recording stay as they were.
"""

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines import config as configs
from pipelines.config import ConfigError
from pipelines.loader import CropStream, Inputs, index_split, model_inputs
from pipelines.training import step
from pipelines.training.graph import WARM_UPS, GraphedStep, GraphError, check_graph, record_on_cuda
from pipelines.training.optimizer_state import restore_state
from sdan import checkpoint

CPU = torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "unique_dim", "_unique", "_unique2", "equal", "is_nonzero"}
"""Operators whose result Python reads, which a CUDA graph cannot record."""


class Recorder(TorchDispatchMode):
    """Runs operators and records them, with the tensors that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{operator} waits for the device")
        outputs = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        for operator, args, kwargs, outputs in self.calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(operator(*args, **kwargs)), strict=True):
                # A view, or a tensor changed in place, has its new values already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record_on_cpu(run):
    """graph.Record with a Recorder; the warm-up is what it runs while recording."""
    run()
    with Recorder() as recorder:
        result = run()

    @torch.no_grad()
    def replay():
        recorder.replay()

    return replay, result


def start(config, *, graphed):
    training = step.start(config, None, CPU, lambda model: model)
    if graphed:
        training.graph = GraphedStep(
            lambda inputs: step.device_step(training, inputs, config), training.skipped_in_a_row, record_on_cpu
        )
    return training


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """On a GPU the losses do not check the range of their pictures, which would wait for the device."""
    monkeypatch.setattr("sdan.losses.check_pixels", lambda *args, **kwargs: None)


@pytest.fixture
def smoke(tiny_shards):
    """(config, inputs of crop n) of a small network, with two crops a batch in two parts."""
    changes = {"train.ema_decay": 0.9, "train.grad_clip": 1.0, "train.accumulate": 2, "train.precision": "fp32"}
    config = configs.override(configs.smoke(), changes)
    stream = CropStream(index_split(str(tiny_shards), "train"), seed=0, crop_px=16, augment=True)

    def inputs(number):
        crops = [stream.crop(number), stream.crop(number + 1)]
        batch = {name: torch.stack([torch.from_numpy(crop[name]) for crop in crops]) for name in crops[0]}
        return model_inputs(batch, config.model, CPU)

    return config, inputs


def train(training, config, inputs, numbers, device=CPU):
    """The terms of each step. The learning rate changes with every step, and batch 4 has a target of NaN."""
    terms = []
    for number in numbers:
        batch = inputs(number)
        if number == 4:
            batch = batch._replace(target=torch.full_like(batch.target, math.nan))
        batch = Inputs(*(None if tensor is None else tensor.to(device) for tensor in batch))
        terms.append(step.train_step(training, batch, config, 1e-3 / (1 + number)))
    return terms


def saved(training):
    """Every tensor that a checkpoint holds, by name."""
    found = {f"model.{name}": value for name, value in training.model.state_dict().items()}
    found |= {f"averaged.{name}": value for name, value in training.averaged.state_dict().items()}
    for number, moments in training.state()["optimizer"]["state"].items():
        found |= {f"adam.{number}.{name}": value for name, value in moments.items()}
    return found


def test_ten_replayed_steps_equal_ten_steps(smoke, tmp_path):
    config, inputs = smoke
    plain, graphed = start(config, graphed=False), start(config, graphed=True)
    terms = [train(training, config, inputs, range(6)) for training in (plain, graphed)]
    checkpoint.save(
        tmp_path / "c", graphed.averaged, config=configs.to_dict(config), scores={}, trainer_state=graphed.state()
    )
    resumed = start(config, graphed=True)
    for training in (resumed, graphed):  # in a new process, and in one that has recorded already
        training.restore(tmp_path / "c")
    expected = train(plain, config, inputs, range(6, 10))
    for training in (resumed, graphed):
        assert_equal_terms(train(training, config, inputs, range(6, 10)), expected)
        assert training.step == plain.step == 10
        for name, value in saved(plain).items():
            assert torch.equal(value, saved(training)[name]), name
    assert_equal_terms(*terms)
    assert [float(each["skipped"]) for each in terms[1]] == [0, 0, 0, 0, 1, 0]


def assert_equal_terms(one, other):
    assert [each.keys() for each in one] == [each.keys() for each in other]
    for left, right in zip(one, other, strict=True):
        for name, value in left.items():
            assert torch.equal(value, right[name]) or (value.isnan() and right[name].isnan()), name


def test_recording_changes_nothing(smoke):
    config, inputs = smoke
    training = start(config, graphed=True)
    before = {name: value.clone() for name, value in saved(training).items()}
    training.skipped_in_a_row.fill_(3)
    training.graph._record(inputs(0))
    after = saved(training)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(after[name].any() for name in after.keys() - before.keys())  # Adam's moments and counts are 0
    assert int(training.skipped_in_a_row) == 3


def test_consecutive_skips_are_counted_by_a_replay(smoke):
    config, inputs = smoke
    training = start(config, graphed=True)
    train(training, config, inputs, [0, 4, 4, 4])
    assert int(training.skipped_in_a_row) == 3
    with pytest.raises(step.NotFiniteError):
        training.check_finite(configs.override(config, {"train.max_skipped": 2}).train)


def test_a_batch_of_another_size_is_not_replayed(smoke):
    config, inputs = smoke
    config = configs.override(config, {"train.accumulate": 1})
    plain, graphed = start(config, graphed=False), start(config, graphed=True)
    for training in (plain, graphed):
        train(training, config, inputs, range(2))
        last = Inputs(*(None if tensor is None else tensor[:1] for tensor in inputs(2)))
        step.train_step(training, last, config, 1e-3)
    for name, value in saved(plain).items():
        assert torch.equal(value, saved(graphed)[name]), name


def test_a_checkpoint_does_not_depend_on_the_graph(smoke):
    """Learning rate and `capturable` are stored as plain values, and are those of the resuming run afterwards."""
    config, inputs = smoke
    graphed = start(config, graphed=True)
    train(graphed, config, inputs, range(1))
    (group,) = graphed.state()["optimizer"]["param_groups"]
    assert (type(group["lr"]), group["capturable"]) == (float, False)
    assert group["lr"] == pytest.approx(1e-3, rel=1e-6)
    restore_state(graphed.optimizer, graphed.state()["optimizer"], graphed.rate, capturable=True)
    (group,) = graphed.optimizer.param_groups
    assert group["lr"] is graphed.rate and group["capturable"] is True


def test_a_contextual_loss_waits_for_the_device(smoke):
    """This is why check_graph refuses it."""
    config, inputs = smoke
    config = configs.override(config, {"loss.cobi_rgb_weight": 1.0, "loss.border_px": 52})
    training = start(config, graphed=True)
    with pytest.raises(RuntimeError, match="waits for the device"):
        step.train_step(training, inputs(0), config, 1e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 2}, "expected one worker, got up to 2 workers"),
        ({"workers": (1, 4)}, "expected one worker, got up to 4 workers"),
        ({"device_type": "cpu"}, "expected a GPU, got cpu"),
        ({"precision": "fp16"}, "expected bf16 or fp32, got fp16"),
        ({"loss": "contextual_weight"}, r"expected no contextual loss, got loss\.contextual_weight above 0"),
    ],
)
def test_what_cannot_be_recorded_gets_one_line(given, said):
    sound = {"device_type": "cuda", "workers": 1, "precision": "auto"}
    config = configs.override(configs.smoke(), {"train.cuda_graph": True})
    check_graph(config, **sound)
    if "loss" in given:
        config, given = configs.override(config, {f"loss.{given['loss']}": 0.1}), {}
    with pytest.raises(ConfigError, match=rf"^train\.cuda_graph: {said}; --set train\.cuda_graph=false$"):
        check_graph(config, **sound | given)
    check_graph(configs.override(config, {"train.cuda_graph": False}), **sound | given)


def test_a_cpu_worker_refuses_to_record():
    with pytest.raises(ConfigError, match="expected a GPU, got cpu"):
        step.start(configs.override(configs.smoke(), {"train.cuda_graph": True}), None, CPU, lambda model: model)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda without a GPU: every call of a recording is accepted, and `fails` is raised at its end."""
    fake = SimpleNamespace(fails=None, modes=[])

    @contextmanager
    def graph(recorded, stream, capture_error_mode):
        fake.modes.append(capture_error_mode)
        try:
            yield
        finally:
            if fake.fails:
                raise fake.fails

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return fake


def test_a_recording_follows_the_warm_ups(cuda):
    calls = []

    def run():
        calls.append(len(cuda.modes))
        return torch.zeros(1)

    record_on_cuda(run)
    assert calls == [0] * WARM_UPS + [1] and cuda.modes == ["thread_local"]


def test_a_step_that_cannot_be_recorded_gets_one_line(cuda):
    cuda.fails = RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")

    def waits():
        if cuda.modes:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return torch.zeros(1)

    said = r"^train\.cuda_graph: expected a step that can be recorded, got operation not permitted when stream is capt"
    with pytest.raises(GraphError, match=said) as caught:
        record_on_cuda(waits)
    assert "\n" not in str(caught.value)
    cuda.fails = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        record_on_cuda(lambda: torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_replays_follow_the_plain_steps(smoke, precision):
    """Not to the bit, because kernels that add atomically round differently each time."""
    config, inputs = smoke
    config = configs.override(config, {"train.precision": precision})
    trainings = []
    for graphed in (False, True):
        changed = configs.override(config, {"train.cuda_graph": graphed})
        training = step.start(changed, None, torch.device("cuda"), lambda model: model)
        terms = train(training, changed, inputs, range(8), "cuda")
        trainings.append((training, [float(each["loss"]) for each in terms]))
    (plain, losses), (graphed, replayed) = trainings
    assert graphed.graph.recording is not None and math.isnan(losses[4]) and math.isnan(replayed[4])
    assert replayed == pytest.approx(losses, rel=1e-3, nan_ok=True)
    for name, value in saved(plain).items():
        if name.endswith("weight") or name.endswith("bias"):
            # Adam moves a weight by the learning rate in the direction of its gradient, however small that is.
            assert (value - saved(graphed)[name]).abs().mean() < 5e-4, name
        if name.endswith("step"):
            assert torch.equal(value, saved(graphed)[name]), name
