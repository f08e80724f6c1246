"""Resampling against values computed by hand: half-pixel centres, borders, offsets in pixels."""

import pytest
import torch
from torch.nn import functional as F

from sdan import resample
from sdan.resample import bicubic, enlarge_offset, low_pass, sample


def test_low_pass_is_an_area_average():
    image = torch.rand(2, 3, 8, 12)
    assert torch.allclose(low_pass(image, 4)[1, 2, 1, 2], image[1, 2, 4:8, 8:12].mean())
    assert low_pass(image, 1) is image
    with pytest.raises(ValueError, match="low_pass: expected a size divisible by factor 3, got 8x12"):
        low_pass(image, 3)


def test_bicubic_keeps_a_ramp_at_half_pixel_centres():
    ramp = (torch.arange(12.0) + 0.5).view(1, 1, 1, 12).expand(1, 1, 12, 12)
    expected = (torch.arange(48.0) + 0.5) / 4
    # PyTorch's kernel (a = -0.75) bends a ramp by up to 0.04 px; a wrong centre would move it by 0.125 px or more.
    assert torch.allclose(bicubic(ramp, 4)[0, 0, 20, 8:-8], expected[8:-8], atol=0.05)
    assert bicubic(ramp.bfloat16(), 4).dtype == torch.float32


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", ["bicubic", "_bicubic_by_matrices"])
def test_bicubic_equals_pytorchs(scale, size, layout, way):
    """Both ways of our own: the CPU's, and the one of CUDA's crops that need a gradient."""
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    image = image.contiguous(memory_format=layout).requires_grad_()
    expected = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), image)
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(resample, way)(image, scale)
    (gradient,) = torch.autograd.grad((got * weights).sum(), image)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_gpu_bicubic_equals_the_cpus(autocast):
    image = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    on_gpu = image.detach().cuda().requires_grad_()
    weights = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    (expected_gradient,) = torch.autograd.grad((bicubic(image, 4) * weights).sum(), image)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got = bicubic(on_gpu, 4)
    (gradient,) = torch.autograd.grad((got * weights.cuda()).sum(), on_gpu)
    for a, b in ((got, bicubic(image, 4)), (bicubic(on_gpu.detach(), 4), got), (gradient, expected_gradient)):
        assert torch.allclose(a.cpu(), b.cpu(), atol=1e-5)


def test_an_enlarged_linear_field_stays_linear():
    """Half-pixel centres, and values in pixels of the finer grid."""
    field = (torch.arange(6.0) + 0.5).view(1, 1, 6, 1).expand(1, 2, 6, 7)
    fine = (torch.arange(24.0) + 0.5) / 4
    assert torch.allclose(enlarge_offset(field, 4)[0, 0, 4:-4, 3], 4 * fine[4:-4])


def test_sample_reads_at_p_plus_offset():
    image, offset = torch.rand(1, 2, 6, 7), torch.zeros(1, 2, 6, 7)
    assert torch.allclose(sample(image, offset), image, atol=1e-6)
    offset[:, 0], offset[:, 1] = 1.0, 0.5
    expected = (image[:, :, 3, 2] + image[:, :, 3, 3]) / 2
    assert torch.allclose(sample(image, offset)[:, :, 2, 2], expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_sample_replicates_the_border(mode):
    image = torch.rand(1, 2, 6, 7)
    far = torch.full((1, 2, 6, 7), 100.0)
    assert torch.allclose(sample(image, far, mode=mode), image[:, :, -1:, -1:].expand_as(image))
    assert torch.allclose(sample(image, -far, mode=mode), image[:, :, :1, :1].expand_as(image))
    pixel = torch.rand(1, 1, 1, 1)
    assert torch.allclose(sample(pixel, torch.full((1, 2, 1, 1), 0.7), mode=mode), pixel)


def test_sample_survives_offsets_that_are_not_finite():
    image = torch.rand(1, 2, 6, 7, requires_grad=True)
    offset = torch.zeros(1, 2, 6, 7)
    offset[:, :, 0], offset[:, :, 1] = torch.nan, torch.inf
    sample(image, offset).sum().backward()
    assert image.grad.isfinite().all()
    assert torch.allclose(image.grad[0, :, 2:-1], torch.ones(()))  # other pixels are sampled as usual
