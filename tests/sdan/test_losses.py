"""Eq. 6 and the two losses of the deployed pass, against small cases computed by hand."""

import pytest
import torch

from sdan import losses
from sdan.losses import LossConfig, sdan_loss, self_reference_loss, transfer_loss
from sdan.network import SDANOutput
from sdan.resample import bicubic, low_pass

L1 = LossConfig(border_px=0)


def output(zoomed, aligned, mask=None, offset=None):
    n, _, height, width = aligned.shape
    return SDANOutput(
        zoomed,
        aligned,
        torch.ones(n, 1, height, width) if mask is None else mask,
        torch.zeros(n, 2, height, width) if offset is None else offset,
    )


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_equation_6_equals_its_terms():
    aligned, zoomed = random(1, 3, 4, 4), random(1, 3, 16, 16, seed=1)
    mask = torch.ones(1, 1, 4, 4)
    mask[..., 2:] = 0  # the right half adds 0 but counts in the mean
    terms = sdan_loss(
        output(zoomed, aligned, mask), aligned - 0.5, zoomed + 0.25, LossConfig(border_px=0, align_weight=3)
    )
    assert float(terms.align) == pytest.approx(0.25)
    assert float(terms.zoom) == pytest.approx(0.125)
    assert float(terms.total) == pytest.approx(3 * 0.25 + 0.125)


def test_charbonnier_of_a_constant_difference():
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)
    config = LossConfig(kind="charbonnier", border_px=0, epsilon=0.3)
    terms = sdan_loss(output(b + 0.4, a), a, b, config)
    assert float(terms.zoom) == pytest.approx(0.5)
    assert float(terms.align) == pytest.approx(0.3)


def test_the_border_is_cropped_on_both_grids():
    aligned, zoomed = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 32, 32)
    reference, target = aligned.clone(), zoomed.clone()
    reference[..., :2], target[..., :7] = 9, 9
    config = LossConfig(border_px=7)  # two whole pixels of X'
    assert float(sdan_loss(output(zoomed, aligned), reference, target, config).total) == 0
    target[..., 7] = 1
    assert float(sdan_loss(output(zoomed, aligned), reference, target, config).zoom) == pytest.approx(1 / 18)


def test_the_mask_is_detached_and_gradients_reach_both_outputs():
    aligned, zoomed = random(1, 3, 4, 4).requires_grad_(), random(1, 3, 8, 8).requires_grad_()
    mask = torch.ones(1, 1, 4, 4, requires_grad=True)
    sdan_loss(output(zoomed, aligned, mask), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8), L1).total.backward()
    assert mask.grad is None
    assert aligned.grad.abs().min() > 0 and zoomed.grad.abs().min() > 0


def test_self_reference_is_zero_if_the_output_averages_to_low():
    low = random(2, 3, 8, 8)
    detail = random(2, 3, 32, 32, seed=2)
    zoomed = low.repeat_interleave(4, 2).repeat_interleave(4, 3) + detail
    zoomed = zoomed - low_pass(detail, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for aligned in (low, low_pass(low, 2)):  # mosaic, packed
        terms = self_reference_loss(output(zoomed, aligned), low, L1)
        assert float(terms.total) < 1e-6
    brighter = self_reference_loss(output(zoomed + 0.1, low), low, L1)
    assert float(brighter.zoom) == pytest.approx(0.1, abs=1e-5) and float(brighter.align) < 1e-6
    terms = self_reference_loss(output(zoomed + 0.1, low + 0.2), low, LossConfig(border_px=0, align_weight=3))
    assert float(terms.align) == pytest.approx(0.2, abs=1e-5)
    assert float(terms.total) == pytest.approx(3 * 0.2 + 0.1, abs=1e-5)


@pytest.mark.parametrize("factor", [4, 8])
def test_transfer_is_zero_for_the_right_output_and_offset(factor):
    """The target is the input's view shifted by whole pixels of x, and the offset is that shift."""
    scene = bicubic(random(1, 3, 12, 12), 8)
    rows, cols = 2, -1
    shift = (rows * factor, cols * factor)
    mine, target = scene[:, :, 16:80, 16:80], scene[:, :, 16 + shift[0] : 80 + shift[0], 16 + shift[1] : 80 + shift[1]]
    offset = torch.tensor([float(rows), float(cols)]).view(1, 2, 1, 1).expand(1, 2, 64 // factor, 64 // factor)
    assert float(transfer_loss(mine, offset, target, L1)) < 1e-5
    assert float(transfer_loss(mine, torch.zeros_like(offset), target, L1)) > 0.01
    assert float(transfer_loss(mine, -offset, target, L1)) > 0.01
    assert float(transfer_loss(target, offset, target, L1)) > 0.01  # the output must stay in the input's view


def test_transfer_is_smallest_at_the_true_subpixel_shift():
    scene = bicubic(random(1, 3, 12, 12), 8)
    mine, target = scene[:, :, 16:80, 16:80], scene[:, :, 22:86, 16:80]  # 1.5 coarse pixels

    def loss(rows):
        offset = torch.zeros(1, 2, 16, 16)
        offset[:, 0] = rows
        return float(transfer_loss(mine, offset, target, LossConfig(border_px=16)))

    assert loss(1.5) < 1e-5
    assert min(loss(1.25), loss(1.75)) > 100 * loss(1.5)


def test_transfer_trains_the_output_and_not_the_offset():
    zoomed = random(1, 3, 16, 16).requires_grad_()
    offset = torch.full((1, 2, 4, 4), 0.3, requires_grad=True)
    transfer_loss(zoomed, offset, torch.zeros(1, 3, 16, 16), L1).backward()
    assert offset.grad is None and zoomed.grad.abs().sum() > 0


def test_transfer_ignores_points_outside_the_image():
    zoomed, target = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    offset = torch.zeros(1, 2, 4, 4)
    offset[:, 1] = 2.0  # two of four columns leave the picture
    assert float(transfer_loss(zoomed, offset, target, L1)) == pytest.approx(0.5)


def test_losses_are_float32_under_autocast():
    zoomed, aligned = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = sdan_loss(output(zoomed.bfloat16(), aligned.bfloat16()), aligned + 1e-3, zoomed + 1.001, L1)
    assert terms.total.dtype == torch.float32
    assert float(terms.zoom) == pytest.approx(1.001, abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "l2"}, "kind: expected one of l1, charbonnier"),
        ({"align_weight": -1}, "align_weight: expected 0 or more"),
        ({"self_reference_weight": float("nan")}, "self_reference_weight: expected 0 or more"),
        ({"epsilon": 0}, "epsilon: expected more than 0"),
        ({"self_target": "sky"}, "self_target: expected one of pair, truth"),
        ({"reference_weight": 0}, "reference_weight: expected more than 0, got 0; raise it, or set self_target=truth"),
        ({"reference_weight": 0, "self_target": "truth"}, "self_reference_weight above 0"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**setting)


def test_too_large_borders_and_wrong_sizes_are_refused():
    aligned, zoomed = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"border_px=8: expected to leave some of 4x4 pixels, got 2 .*; set a smaller"):
        sdan_loss(output(zoomed, aligned), aligned, zoomed, LossConfig(border_px=8))
    with pytest.raises(ValueError, match=r"size: expected a multiple of \(4, 4\), got \(18, 18\)"):
        sdan_loss(output(zoomed, aligned), aligned, torch.zeros(1, 3, 18, 18), L1)
    with pytest.raises(ValueError, match="loss: expected images of one size"):
        sdan_loss(output(zoomed, aligned), aligned[..., :2], zoomed, L1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda picture: picture.numpy(), r"expected a torch\.Tensor, got numpy\.ndarray"),
        (lambda picture: (255 * picture).byte(), r"expected floating point values, got torch\.uint8"),
        (lambda picture: 255 * picture, None),
    ],
)
def test_targets_of_another_type_or_range_are_refused(wrong, said):
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(1, 3, 16, 16, generator=generator), torch.rand(1, 3, 32, 32, generator=generator)
    result, offset = output(high, low), torch.zeros(1, 2, 16, 16)
    calls = {
        "sdan_loss, reference": lambda: sdan_loss(result, wrong(low), high, L1),
        "sdan_loss, target": lambda: sdan_loss(result, low, wrong(high), L1),
        "self_reference_loss, low": lambda: self_reference_loss(result, wrong(low), L1),
        "transfer_loss, target": lambda: transfer_loss(high, offset, wrong(high), L1),
    }
    for name, call in calls.items():
        expected = f"{name}: {said}" if said else r"loss, target: expected values in \[0, 1\], got .* to 25\d"
        with pytest.raises(ValueError, match=expected):
            call()


def test_halo_is_the_distance_from_the_targets_range_nearby():
    """A step from 0.2 to 0.8: near the step values between the two cost nothing; elsewhere only the excess does."""
    target = torch.full((1, 3, 16, 16), 0.2)
    target[..., 8:] = 0.8
    config = LossConfig(halo_weight=1.0, border_px=0)
    mask = torch.ones(1, 1, 16, 16)

    def halo(image):
        return float(losses._target_loss(image, target, mask, config, None)[1]["halo"])

    blurred = target.clone()
    blurred[..., 7], blurred[..., 8] = 0.4, 0.6
    assert halo(target) == 0 and halo(blurred) == 0
    ringing = target.clone()
    ringing[..., 6], ringing[..., 9] = 0.1, 0.85
    assert halo(ringing) == pytest.approx((0.1 + 0.05) / 16, rel=1e-4)
    far = target.clone()
    far[..., 2] = 0.3
    assert halo(far) == pytest.approx(0.1 / 16, rel=1e-4)
    assert halo(ringing) == pytest.approx(halo(ringing.flip(2)), rel=1e-6)


def test_halo_weight_adds_to_the_loss():
    target, image = torch.rand(1, 3, 16, 16), 2 * torch.rand(1, 3, 16, 16) - 0.5
    mask = torch.ones(1, 1, 16, 16)
    plain, more = (
        losses._target_loss(image, target, mask, LossConfig(halo_weight=weight, border_px=0), None)
        for weight in (0.0, 2.0)
    )
    assert plain[1] == {} and more[0] == pytest.approx(float(plain[0] + 2 * more[1]["halo"]), rel=1e-5)
