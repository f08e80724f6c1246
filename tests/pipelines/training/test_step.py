"""One training step: schedule, weight average, resuming, skipped steps, accumulation and memory layout."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines import config as configs
from pipelines.loader import CropStream, Inputs, index_split, model_inputs, training_stream
from pipelines.training import step
from sdan import checkpoint
from sdan.ops import precision
from sdan.perceptual import st_lpips


def test_the_learning_rate_restarts_after_each_period():
    config = configs.TrainConfig(learning_rate=1.0, learning_rate_floor=0.1, restart_epochs=2, warmup_steps=4)
    rates = [step.learning_rate(number, number / 10, config) for number in range(62)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[20] == pytest.approx(1.0)  # first restart, after 2 epochs
    assert rates[19] < 0.12
    assert rates[40] == pytest.approx(0.55)  # the middle of the second period, 4 epochs long
    assert rates[60] == pytest.approx(1.0)


def test_the_learning_rate_depends_on_crops_not_steps():
    """Two workers take half as many steps for the same crops; the rate at each crop is the same."""
    config = configs.TrainConfig(restart_epochs=3)
    alone = [step.learning_rate(crops // 4, crops / 40, config) for crops in range(0, 200, 8)]
    by_two = [step.learning_rate(crops // 8, crops / 40, config) for crops in range(0, 200, 8)]
    assert alone == by_two


@pytest.fixture
def smoke(tiny_shards):
    config = configs.override(configs.smoke(), {"train.ema_decay": 0.9})
    stream = CropStream(index_split(str(tiny_shards), "train"), seed=0, crop_px=16, augment=True)

    def inputs(number):
        batch = {name: torch.from_numpy(value)[None] for name, value in stream.crop(number).items()}
        return model_inputs(batch, config.model, torch.device("cpu"))

    return config, inputs


def test_the_loss_falls(smoke):
    config, inputs = smoke
    training = step.start(config, None, torch.device("cpu"), lambda model: model)
    losses = [float(step.train_step(training, inputs(0), config, 1e-3)["loss"]) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_restored_training_takes_the_same_step(smoke, tmp_path):
    config, inputs = smoke
    training = step.start(config, None, torch.device("cpu"), lambda model: model)
    for number in range(3):
        step.train_step(training, inputs(number), config, 1e-3)
    checkpoint.save(
        tmp_path / "c", training.averaged, config=configs.to_dict(config), scores={}, trainer_state=training.state()
    )
    step.train_step(training, inputs(3), config, 1e-3)
    resumed = step.start(config, None, torch.device("cpu"), lambda model: model)
    resumed.restore(tmp_path / "c")
    step.train_step(resumed, inputs(3), config, 1e-3)
    assert resumed.step == training.step == 4
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in training.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name]), name


def test_the_average_moves_less_than_the_weights(smoke):
    config, inputs = smoke
    training = step.start(config, None, torch.device("cpu"), lambda model: model)
    before = copy.deepcopy(training.averaged.state_dict())
    for number in range(4):
        step.train_step(training, inputs(number), config, 1e-3)
    name = "head.weight"
    moved = (training.averaged.state_dict()[name] - before[name]).norm()
    ahead = (training.model.state_dict()[name] - before[name]).norm()
    assert 0 < moved < ahead


def test_true_targets_train_only_the_deployed_output(tiny_shards):
    """Without reference samples the loss is eq. 6 on {X, X} against the ideal picture, and it falls."""
    overrides = {"loss.self_target": "truth", "loss.reference_weight": 0.0}
    config = configs.override(configs.smoke(), overrides)
    index = index_split(str(tiny_shards), "train")
    crop = CropStream(index, seed=0, crop_px=16, augment=True, truth=True).crop(0)
    batch = {name: torch.from_numpy(value)[None] for name, value in crop.items()}
    inputs = model_inputs(batch, config.model, torch.device("cpu"))
    training = step.start(config, None, torch.device("cpu"), lambda model: model)
    terms = [step.train_step(training, inputs, config, 1e-3) for _ in range(40)]
    assert terms[0].keys() == {"loss", "self", "grad_norm", "skipped"}
    assert float(terms[-1]["loss"]) < 0.9 * float(terms[0]["loss"])


def test_known_shifts_teach_the_offset_learner(tiny_shards):
    overrides = {"model.offset_learner": "pyramid", "model.max_shift_px": 8, "loss.known_shift_weight": 1.0}
    config = configs.override(configs.smoke(), {**overrides, "loss.self_reference_weight": 0.0})
    crop = training_stream(index_split(str(tiny_shards), "train"), config).crop(0)
    batch = {name: torch.from_numpy(value)[None] for name, value in crop.items()}
    inputs = model_inputs(batch, config.model, torch.device("cpu"))
    training = step.start(config, None, torch.device("cpu"), lambda model: model)
    terms = [step.train_step(training, inputs, config, 2e-3) for _ in range(20)]
    assert terms[0].keys() == {"loss", "align", "zoom", "known_shift", "grad_norm", "skipped"}
    assert float(terms[-1]["known_shift"]) < 0.9 * float(terms[0]["known_shift"])


def test_each_kind_of_sample_reports_its_terms(smoke, tiny_shards):
    config, inputs = smoke
    terms = step.training_loss(step.start(config, None, torch.device("cpu"), _same).model, inputs(0), config.loss)
    assert terms.keys() == {"loss", "align", "zoom", "self", "transfer"}
    paper = configs.override(config, {"loss.self_reference_weight": 0.0})
    terms = step.training_loss(step.start(paper, None, torch.device("cpu"), _same).model, inputs(0), paper.loss)
    assert terms.keys() == {"loss", "align", "zoom"}


def test_the_losses_of_table_1_train_and_report_their_terms(smoke, vgg_weights):
    config, inputs = smoke
    overrides = {"loss.pixel_weight": 0.0, "loss.cobi_rgb_weight": 1.0, "loss.perceptual_weight": 0.1}
    config = configs.override(config, overrides | {"loss.border_px": 52})  # leaves 24 px, for speed
    training = step.start(config, None, torch.device("cpu"), _same, vgg_weights)
    terms = [step.train_step(training, inputs(0), config, 1e-3) for _ in range(6)]
    assert {"align", "zoom", "cobi_rgb", "perceptual", "self", "transfer"} <= terms[0].keys()
    assert "pixel" not in terms[0]
    assert float(terms[-1]["loss"]) < float(terms[0]["loss"])
    assert not any("vgg" in name or "features.0" in name for name in training.state()["model"])


def test_st_lpips_trains_both_kinds_of_samples(smoke, st_lpips_weights, monkeypatch):
    network = st_lpips.STLPIPS(st_lpips_weights)
    monkeypatch.setattr(st_lpips, "st_lpips_on", lambda device: network)
    config, inputs = smoke
    config = configs.override(config, {"loss.border_px": 48})  # leaves 32 px, for speed
    heavier = configs.override(config, {"loss.st_lpips_weight": 1.0})
    training = step.start(heavier, None, torch.device("cpu"), _same)
    plain = step.training_loss(training.model, inputs(0), config.loss)
    terms = step.training_loss(training.model, inputs(0), heavier.loss)
    added = (terms["zoom"] - plain["zoom"]).detach()
    assert float(added) == pytest.approx(float(terms["st_lpips"].detach()), rel=1e-3)
    assert terms["self"] == plain["self"] and terms["transfer"] > plain["transfer"]
    terms = [step.train_step(training, inputs(0), heavier, 1e-3) for _ in range(6)]
    assert float(terms[-1]["loss"]) < float(terms[0]["loss"])


def _same(model):
    """The wrapper for training in one process: the model itself."""
    return model


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(smoke, where, monkeypatch):
    config, inputs = smoke
    training = step.start(config, None, torch.device("cpu"), _same)
    step.train_step(training, inputs(0), config, 1e-3)
    kept = (training.model, training.averaged, training.optimizer)
    before = copy.deepcopy([part.state_dict() for part in kept])
    with monkeypatch.context() as broken:
        if where == "loss":  # infinite, but with a finite gradient
            sound = step.training_loss
            broken.setattr(step, "training_loss", lambda *a: {k: v + math.inf for k, v in sound(*a).items()})
        else:
            training.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
        terms = step.train_step(training, inputs(1), config, 1e-3)
        training.model.head.weight._backward_hooks = None
    _assert_equal(before, [part.state_dict() for part in kept])
    assert float(terms["skipped"]) == 1 == int(training.skipped_in_a_row)
    assert float(step.train_step(training, inputs(2), config, 1e-3)["skipped"]) == 0 == int(training.skipped_in_a_row)
    assert not torch.equal(training.model.head.weight, before[0]["head.weight"])
    assert training.step == 3


def test_consecutive_skipped_steps_end_the_run(smoke):
    config, inputs = smoke
    config = configs.override(config, {"train.max_skipped": 3})
    training = step.start(config, None, torch.device("cpu"), _same)
    nothing = inputs(0)._replace(x=inputs(0).x * math.nan)
    for number in range(6):
        step.train_step(training, inputs(number) if number == 0 else nothing, config, 1e-3)
        if number < 5:
            training.check_finite(config.train)
    with pytest.raises(step.NotFiniteError, match=r"NaN or infinity in 3 steps in a row; lower train\.learning_rate"):
        training.check_finite(config.train)


def _assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        _assert_equal(list(a.values()), list(b.values()))
    elif isinstance(a, (list, tuple)):
        for left, right in zip(a, b, strict=True):
            _assert_equal(left, right)
    else:
        assert a == b


def after_a_step(config, inputs, **changes):
    """Weights and loss terms after one step of a fresh training."""
    config = configs.override(config, {f"train.{name}": value for name, value in changes.items()})
    training = step.start(config, None, torch.device("cpu"), _same)
    terms = step.train_step(training, inputs, config, 1e-3)
    return training, terms


def together(crops):
    """Concatenate crops to one batch."""
    return Inputs(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*crops, strict=True)))


def assert_alike(one, other, tolerance):
    for name, value in one.model.state_dict().items():
        assert (value - other.model.state_dict()[name]).abs().max() <= tolerance, name


def test_accumulated_parts_equal_the_whole_batch(smoke):
    config, inputs = smoke
    batch = together([inputs(number) for number in range(4)])
    changes = {"train.batch_per_worker": 4, "train.grad_clip": 1.0, "train.precision": "fp32"}
    config = configs.override(config, changes)
    whole, terms = after_a_step(config, batch)
    for count in (2, 4):
        split, split_terms = after_a_step(config, batch, accumulate=count)
        assert_alike(whole, split, 2e-5)  # Adam's first step is the gradient's sign: 1e-3 each way
        for name, term in terms.items():
            assert float(split_terms[name]) == pytest.approx(float(term), rel=1e-4), name


def test_accumulate_must_divide_the_batch():
    with pytest.raises(configs.ConfigError, match=r"accumulate: expected a divisor of .* = 8, got 3"):
        configs.TrainConfig(batch_per_worker=8, accumulate=3)


def test_one_part_that_is_not_finite_skips_the_step(smoke):
    config, inputs = smoke
    batch = inputs(0)
    broken = batch._replace(target=torch.full_like(batch.target, math.nan))
    both = together([batch, broken])
    config = configs.override(config, {"train.batch_per_worker": 2, "train.accumulate": 2})
    training = step.start(config, None, torch.device("cpu"), _same)
    before = copy.deepcopy(training.model.state_dict())
    assert float(step.train_step(training, both, config, 1e-3)["skipped"]) == 1
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())


def test_the_memory_layout_does_not_change_a_step(smoke):
    config, inputs = smoke
    plain, _ = after_a_step(config, inputs(0), layout="contiguous")
    training, _ = after_a_step(config, inputs(0), layout="channels_last")
    assert_alike(plain, training, 2e-5)
    assert training.model.super_resolution.join.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.model.super_resolution.join.weight.is_contiguous()


def test_a_run_resumes_in_another_memory_layout(smoke, tmp_path):
    """The optimizer's moments get the layout of the weights, else they would belong to other weights."""
    config, inputs = smoke
    training, _ = after_a_step(config, inputs(0), layout="contiguous")
    stored = {"config": configs.to_dict(config), "scores": {}, "trainer_state": training.state()}
    checkpoint.save(tmp_path / "c", training.averaged, **stored)
    resumed = step.start(config, None, torch.device("cpu"), _same)
    resumed.restore(tmp_path / "c")
    assert resumed.model.super_resolution.join.weight.is_contiguous(memory_format=torch.channels_last)
    for number in (1, 2):
        losses = [float(step.train_step(one, inputs(number), config, 1e-3)["loss"]) for one in (training, resumed)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert_alike(training, resumed, 2e-4)  # with mixed-up moments: 2e-3


@pytest.fixture
def alone(tmp_path):
    """A process group with this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


KNOWN_SHIFTS = {"model.offset_learner": "pyramid", "model.max_shift_px": 8, "loss.known_shift_weight": 1.0}


@pytest.mark.parametrize("more", [{}, KNOWN_SHIFTS], ids=["", "known_shifts"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_distributed_training_takes_the_same_steps(smoke, alone, accumulate, more):
    """With the bucket options of a worker: a static graph, unless only the last part's gradients are exchanged."""
    config, inputs = smoke
    changes = {"train.batch_per_worker": 2, "train.accumulate": accumulate}
    config = configs.override(config, changes | more)
    batches = [together([inputs(number), inputs(number + 1)]) for number in (0, 2, 4)]
    torch.manual_seed(0)
    batches = [batch._replace(motion=torch.randn(2, 2, 3, 3)) for batch in batches]
    losses = []
    for wrap in (_same, lambda model: DistributedDataParallel(model, **step.bucket_options(config.train))):
        training = step.start(config, None, torch.device("cpu"), wrap)
        losses.append([float(step.train_step(training, batch, config, 1e-3)["loss"]) for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compiled_network_takes_the_same_steps(smoke, alone, accumulate):
    """Inside DDP, with a weight average, a gradient scaler and parts of a batch."""
    config, inputs = smoke
    changes = {"train.batch_per_worker": 2, "train.accumulate": accumulate, "train.precision": "fp32"}
    config = configs.override(config, changes)
    trainings, losses, options = [], [], step.bucket_options(config.train)
    for compiled in (False, True):
        changed = configs.override(config, {"train.compile": compiled})
        training = step.start(changed, None, torch.device("cpu"), lambda m: DistributedDataParallel(m, **options))
        training.scaler = torch.amp.GradScaler("cpu", enabled=True)
        batches = [together([inputs(number), inputs(number + 1)]) for number in (0, 2)]
        losses.append([float(step.train_step(training, batch, changed, 1e-3)["loss"]) for batch in batches])
        trainings.append(training)
    plain, compiled = trainings
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert_alike(plain, compiled, 1e-4)
    for name, value in plain.averaged.state_dict().items():
        assert (value - compiled.averaged.state_dict()[name]).abs().max() < 1e-4, name
    assert compiled.state()["model"].keys() == plain.state()["model"].keys()


class Casts(TorchDispatchMode):
    """Counts the casts of each of `weights` to another type."""

    def __init__(self, weights):
        super().__init__()
        self.names = {id(weight): name for name, weight in weights}
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and id(args[0]) in self.names:
            self.counts[self.names[id(args[0])]] += 1
        return operator(*args, **(kwargs or {}))


def test_a_step_casts_each_weight_once(smoke):
    """Also if it has several parts. Both kinds of samples share one forward pass."""
    config, inputs = smoke
    batch = together([inputs(0), inputs(1)])
    changes = {"train.batch_per_worker": 2, "train.accumulate": 2, "train.precision": "bf16"}
    config = configs.override(config, changes)
    training = step.start(config, None, torch.device("cpu"), _same)
    with Casts(training.model.named_parameters()) as casts:
        step.train_step(training, batch, config, 1e-3)
    assert casts.counts["head.weight"] == 1 == casts.counts["super_resolution.join.weight"]
    # The deformable convolution casts its weight itself, once per part; gamma is one number per attention.
    again = {name for name, count in casts.counts.items() if count > 1}
    assert again <= {"alignment.deform.weight", "alignment.deform.bias"} | {n for n in again if n.endswith("gamma")}


def test_parts_that_share_casts_add_the_same_gradient(smoke):
    config, inputs = smoke
    batch = together([inputs(0), inputs(1)])
    config = configs.override(config, {"train.batch_per_worker": 2, "train.precision": "bf16"})
    terms = after_a_step(config, batch)[1]
    split_terms = after_a_step(config, batch, accumulate=2)[1]
    for name in ("loss", "grad_norm"):
        assert float(split_terms[name]) == pytest.approx(float(terms[name]), rel=0.02), name


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_trains_in_what_the_cpu_computes(smoke, monkeypatch, has_bf16, expected):
    config, inputs = smoke
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)
    training = step.start(config, None, torch.device("cpu"), _same)
    assert str(training.plan) == f"{expected}, channels_last"
    seen = []
    training.model.head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    step.train_step(training, inputs(0), config, 1e-3)
    assert seen == [torch.bfloat16 if has_bf16 else torch.float32]


def test_a_checkpoint_of_an_older_version_is_restored(smoke, tmp_path):
    """It holds a rate in double precision, and no learning rate on the device."""
    config, inputs = smoke
    training, _ = after_a_step(config, inputs(0))
    state = training.state()
    state["optimizer"]["param_groups"][0]["lr"] = 0.3
    old = configs.to_dict(config)
    old["train"] = {k: v for k, v in old["train"].items() if k not in ("tf32", "cuda_graph")}
    old["train"]["layout"] = "channels_last"
    checkpoint.save(tmp_path / "c", training.averaged, config=old, scores={}, trainer_state=state)
    resumed = step.start(configs.from_dict(old), None, torch.device("cpu"), _same)
    resumed.restore(tmp_path / "c")
    for one in (training, resumed):
        step.train_step(one, inputs(1), config, 1e-3)
    assert resumed.optimizer.param_groups[0]["lr"] is resumed.rate
    _assert_equal(training.model.state_dict(), resumed.model.state_dict())


def test_a_run_can_resume_in_fp16(smoke, tmp_path):
    """A run that started without a gradient scaler has no scaler state to restore."""
    config, _ = smoke
    training = step.start(config, None, torch.device("cpu"), lambda model: model)
    checkpoint.save(
        tmp_path / "c", training.averaged, config=configs.to_dict(config), scores={}, trainer_state=training.state()
    )
    resumed = step.start(config, None, torch.device("cpu"), lambda model: model)
    resumed.scaler = torch.amp.GradScaler("cpu", enabled=True)
    resumed.restore(tmp_path / "c")
    assert resumed.scaler.get_scale() == torch.amp.GradScaler("cpu", enabled=True).get_scale()
