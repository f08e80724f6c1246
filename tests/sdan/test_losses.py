"""Eq. 6 and the two terms for the deployed path, against small cases worked out by hand."""

import pytest
import torch

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


def test_equation_6_term_by_term():
    aligned, zoomed = random(1, 3, 4, 4), random(1, 3, 16, 16, seed=1)
    mask = torch.ones(1, 1, 4, 4)
    mask[..., 2:] = 0  # the right half does not count, but it does divide
    terms = sdan_loss(
        output(zoomed, aligned, mask), aligned - 0.5, zoomed + 0.25, LossConfig(border_px=0, align_weight=3)
    )
    assert float(terms.align) == pytest.approx(0.25)
    assert float(terms.zoom) == pytest.approx(0.125)
    assert float(terms.total) == pytest.approx(3 * 0.25 + 0.125)


def test_a_constant_charbonnier():
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)
    config = LossConfig(kind="charbonnier", border_px=0, epsilon=0.3)
    terms = sdan_loss(output(b + 0.4, a), a, b, config)
    assert float(terms.zoom) == pytest.approx(0.5)
    assert float(terms.align) == pytest.approx(0.3)


def test_the_border_does_not_count_on_either_grid():
    aligned, zoomed = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 32, 32)
    reference, target = aligned.clone(), zoomed.clone()
    reference[..., :2], target[..., :7] = 9, 9
    config = LossConfig(border_px=7)  # two whole pixels of X'
    assert float(sdan_loss(output(zoomed, aligned), reference, target, config).total) == 0
    target[..., 7] = 9
    assert float(sdan_loss(output(zoomed, aligned), reference, target, config).zoom) == pytest.approx(9 / 18)


def test_the_mask_is_detached_and_gradients_reach_both_outputs():
    aligned, zoomed = random(1, 3, 4, 4).requires_grad_(), random(1, 3, 8, 8).requires_grad_()
    mask = torch.ones(1, 1, 4, 4, requires_grad=True)
    sdan_loss(output(zoomed, aligned, mask), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8), L1).total.backward()
    assert mask.grad is None
    assert aligned.grad.abs().min() > 0 and zoomed.grad.abs().min() > 0


def test_self_reference_is_zero_for_an_answer_that_averages_to_the_input():
    low = random(2, 3, 8, 8)
    detail = random(2, 3, 32, 32, seed=2)
    zoomed = low.repeat_interleave(4, 2).repeat_interleave(4, 3) + detail
    zoomed = zoomed - low_pass(detail, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for aligned in (low, low_pass(low, 2)):  # mosaic, packed
        terms = self_reference_loss(output(zoomed, aligned), low, L1)
        assert float(terms.total) < 1e-6
    brighter = self_reference_loss(output(zoomed + 0.1, low), low, L1)
    assert float(brighter.zoom) == pytest.approx(0.1, abs=1e-5) and float(brighter.align) < 1e-6
    assert float(self_reference_loss(output(zoomed, low + 0.2), low, L1).align) == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("factor", [4, 8])
def test_transfer_is_zero_at_the_right_answer_of_a_shifted_pair(factor):
    """The target shows what the input's view has `shift` coarse pixels further on; the offset says so."""
    scene = bicubic(random(1, 3, 12, 12), 8)
    rows, cols = 2, -1
    shift = (rows * factor, cols * factor)
    mine, target = scene[:, :, 16:80, 16:80], scene[:, :, 16 + shift[0] : 80 + shift[0], 16 + shift[1] : 80 + shift[1]]
    offset = torch.tensor([float(rows), float(cols)]).view(1, 2, 1, 1).expand(1, 2, 64 // factor, 64 // factor)
    assert float(transfer_loss(mine, offset, target, L1)) < 1e-5
    assert float(transfer_loss(mine, torch.zeros_like(offset), target, L1)) > 0.01
    assert float(transfer_loss(mine, -offset, target, L1)) > 0.01
    assert float(transfer_loss(target, offset, target, L1)) > 0.01  # it must not teach the target's view


def test_transfer_finds_a_subpixel_shift_better_than_its_neighbours():
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


def test_transfer_ignores_what_the_offset_finds_outside():
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
        ({"kind": "l2"}, "kind: one of l1, charbonnier"),
        ({"align_weight": -1}, "align_weight: 0 or more"),
        ({"self_reference_weight": float("nan")}, "self_reference_weight: 0 or more"),
        ({"epsilon": 0}, "epsilon: more than 0"),
        ({"self_target": "sky"}, "self_target: one of pair, truth"),
        ({"reference_weight": 0}, "only self_target=truth"),
        ({"reference_weight": 0, "self_target": "truth"}, "self_reference_weight above 0"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**setting)


def test_a_border_that_leaves_nothing_and_wrong_sizes_are_refused():
    aligned, zoomed = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="leaves nothing; set a smaller"):
        sdan_loss(output(zoomed, aligned), aligned, zoomed, LossConfig(border_px=8))
    with pytest.raises(ValueError, match="whole multiple"):
        sdan_loss(output(zoomed, aligned), aligned, torch.zeros(1, 3, 18, 18), L1)
    with pytest.raises(ValueError, match="images of one size"):
        sdan_loss(output(zoomed, aligned), aligned[..., :2], zoomed, L1)
