"""Metrics against their definitions, written as plain loops."""

import hashlib
import math

import lpips
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.models import alexnet

from sdan import metrics
from sdan.metrics import alignment_gain, end_point_error, offset_statistics, psnr, resized_end_point_error, ssim
from sdan.resample import bicubic


def pair(height=17, width=19, n=2):
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(n, 3, height, width, generator=generator)
    return (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def ssim_by_definition(a, b, valid):
    """Wang et al. 2004, one window after the other."""
    taps = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    window = torch.tensor([[p * q for p in taps] for q in taps], dtype=torch.float64)
    window /= window.sum()
    values = []
    for channel in range(a.shape[0]):
        for row in range(a.shape[1] - 10):
            for col in range(a.shape[2] - 10):
                inside = (slice(row, row + 11), slice(col, col + 11))
                if valid[inside].min() == 0:
                    continue
                x, y = a[channel][inside].double(), b[channel][inside].double()
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(torch.stack(values).mean())


def test_psnr_equals_its_definition_for_each_image():
    image, target = pair()
    for n in range(2):
        errors = [(float(a) - float(b)) ** 2 for a, b in zip(image[n].flatten(), target[n].flatten(), strict=True)]
        assert float(psnr(image, target)[n]) == pytest.approx(10 * math.log10(len(errors) / sum(errors)), abs=1e-6)


@pytest.mark.parametrize("size", [(11, 11), (64, 47), (128, 128)])
def test_psnr_and_ssim_agree_with_scikit_image(size):
    image, target = pair(*size)
    for n in range(2):
        ours, theirs = (picture[n].permute(1, 2, 0).double().numpy() for picture in (image, target))
        expected = structural_similarity(
            ours, theirs, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(image, target)[n]) == pytest.approx(expected, abs=1e-4)
        expected = peak_signal_noise_ratio(theirs, ours, data_range=1)
        assert float(psnr(image, target)[n]) == pytest.approx(expected, abs=1e-4)


def test_psnr_counts_pixels_in_the_mask_and_the_border():
    image, target = pair()
    mask = torch.zeros(2, 1, 17, 19)
    mask[0, :, 4:9, 5:12] = 1
    mask[1, :, 6:, 7:] = 1
    spoilt = torch.where(mask > 0, image, 9.0)
    assert torch.allclose(
        psnr(spoilt, target, mask=mask)[0], psnr(image[:1, :, 4:9, 5:12], target[:1, :, 4:9, 5:12])[0]
    )
    expected = psnr(image[1:, :, 6:14, 7:16], target[1:, :, 6:14, 7:16])
    assert torch.allclose(psnr(spoilt, target, mask=mask, border_px=3)[1], expected[0])


def test_scores_of_equal_pictures_and_of_empty_masks():
    image, target = pair()
    assert torch.isinf(psnr(image, image)).all()
    assert torch.allclose(ssim(image, image), torch.ones(2, dtype=torch.float64))
    nothing = torch.zeros(2, 1, 17, 19)
    assert torch.isnan(psnr(image, target, mask=nothing)).all()
    assert torch.isnan(ssim(image, target, mask=nothing)).all()


def test_masked_pixels_may_be_nan():
    image, target = pair()
    mask = torch.ones(2, 1, 17, 19)
    mask[:, :, :3] = 0
    poisoned = torch.where(mask > 0, target, torch.nan)
    assert torch.allclose(psnr(image, poisoned, mask=mask), psnr(image[:, :, 3:], target[:, :, 3:]))
    assert torch.allclose(ssim(image, poisoned, mask=mask), ssim(image[:, :, 3:], target[:, :, 3:]))


def test_ssim_equals_its_definition():
    image, target = pair()
    mask = torch.ones(2, 1, 17, 19)
    mask[1, :, 2, 3] = 0
    scores = ssim(image, target, mask=mask)
    for n in range(2):
        assert float(scores[n]) == pytest.approx(ssim_by_definition(image[n], target[n], mask[n, 0]), abs=1e-9)
    assert torch.allclose(ssim(image, target, border_px=3), ssim(image[:, :, 3:-3, 3:-3], target[:, :, 3:-3, 3:-3]))


def test_end_point_error_is_the_mean_distance():
    true = torch.zeros(1, 2, 4, 6)
    offset = true.clone()
    offset[:, 0], offset[:, 1] = 3.0, -4.0
    assert float(end_point_error(offset, true)) == pytest.approx(5.0)
    offset[..., :3] = 0
    assert float(end_point_error(offset, true)) == pytest.approx(2.5)
    mask = torch.ones(1, 1, 4, 6)
    mask[..., :3] = 0
    assert float(end_point_error(offset, true, mask=mask)) == pytest.approx(5.0)


def test_only_offsets_that_point_inside_are_counted():
    true = torch.zeros(1, 2, 4, 4)
    true[:, :, :2] = 100.0
    offset = torch.zeros(1, 2, 4, 4)
    offset[:, 0] = 3.0
    assert float(resized_end_point_error(offset, true, inside=True)) == pytest.approx(3.0)


def test_the_alignment_gain_of_true_offsets_is_positive():
    torch.manual_seed(0)
    wide = bicubic(torch.rand(2, 3, 12, 12), 2).clamp(0, 1)
    picture, seen = wide[..., :16, :16], wide[..., 2:18, :16]  # the target shows what lies 2 px lower
    target = bicubic(seen, 4).clamp(0, 1)
    true = torch.zeros(2, 2, 8, 8)
    true[:, 0] = 1.0  # its pixels are two of the picture's
    assert (alignment_gain(picture, true, target, border_px=16) > 10).all()
    assert alignment_gain(picture, 0 * true, target).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert (alignment_gain(picture, -true, target, border_px=16) < 3).all()


def test_resized_end_point_error_is_in_pixels_of_the_true_flow():
    true = torch.zeros(2, 2, 8, 12)
    true[:, 0], true[:, 1] = 3.0, -4.0
    offset = true[:, :, ::2, ::2] / 2  # half as many pixels, twice as large
    assert resized_end_point_error(offset, true).tolist() == [0, 0]
    offset[1] = 0
    assert resized_end_point_error(offset, true).tolist() == pytest.approx([0, 5])


def test_offset_statistics_of_a_known_field():
    offset = torch.zeros(1, 2, 10, 10)
    offset[:, 0] = 3.0
    offset[:, 1, :, 5:] = 4.0  # one step of 4 px between columns
    mask = torch.ones(1, 1, 10, 10)
    mask[..., :2, :] = 0
    found = {name: values[0] for name, values in offset_statistics(offset, mask, px_per_offset=2.0).items()}
    assert found == pytest.approx(
        {
            "offset_px": 2 * (3 + 5) / 2,
            "offset_p95_px": 2 * 5,
            "offset_outside": 0.2,
            "offset_roughness": (4 / 9) / 2,
        }
    )


def test_sizes_that_do_not_match_are_refused():
    image, target = pair()
    with pytest.raises(ValueError, match=r"expected two images .* of one size"):
        psnr(image, target[..., :-1])
    with pytest.raises(ValueError, match=r"mask: expected \[2,1,17,19\], got"):
        psnr(image, target, mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match="border_px: expected 0 to 8 for 17x19, got 9"):
        psnr(image, target, border_px=9)
    with pytest.raises(ValueError, match="11x11"):
        ssim(image[..., :10], target[..., :10])


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A file of seeded weights whose hash the module expects in place of torchvision's."""
    torch.manual_seed(0)
    path = tmp_path / "alexnet.pth"
    torch.save(alexnet(weights=None).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(metrics, "BACKBONE", f"alexnet-owt-{digest[:8]}.pth")
    monkeypatch.setenv("SDAN_LPIPS_BACKBONE", str(path))
    return path


def test_lpips_uses_the_given_backbone_and_lpips_heads(backbone):
    generator = torch.Generator().manual_seed(1)
    image, target = (torch.rand(2, 3, 64, 64, generator=generator) for _ in range(2))
    assert metrics.lpips_unavailable() is None
    distance = metrics.lpips_distance(image, target)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    stored = torch.load(backbone, weights_only=True)
    with torch.no_grad():
        for name, value in reference.net.named_parameters():
            value.copy_(stored["features." + name.split(".", 1)[1]])
        expected = reference(2 * image - 1, 2 * target - 1).flatten()
    assert torch.allclose(distance, expected, atol=1e-6)
    assert torch.allclose(metrics.lpips_distance(image, image), torch.zeros(2), atol=1e-6)


def test_lpips_without_its_backbone_is_none_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("SDAN_LPIPS_BACKBONE", str(tmp_path / "none.pth"))
    image, target = pair(64, 64)
    assert metrics.lpips_distance(image, target) is None
    line = metrics.lpips_unavailable()
    assert "none.pth: expected AlexNet weights, got none" in line and "SDAN_LPIPS_BACKBONE" in line
    assert metrics.BACKBONE in line and "\n" not in line


def test_lpips_refuses_other_weights(tmp_path, monkeypatch):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    monkeypatch.setenv("SDAN_LPIPS_BACKBONE", str(path))
    assert "other.pth: expected torchvision's AlexNet, SHA-256 7be5be79..., got another" in metrics.lpips_unavailable()
    assert metrics.lpips_distance(*pair(64, 64)) is None


PICTURES = {
    "numpy": (lambda picture: picture.numpy(), r"expected a torch\.Tensor, got numpy\.ndarray"),
    "a list": (lambda picture: picture.tolist(), r"expected a torch\.Tensor, got list"),
    "8 bits": (lambda picture: (255 * picture).byte(), r"expected floating point values, got torch\.uint8"),
    "[0, 255]": (lambda picture: 255 * picture, r"expected values in \[0, 1\], got .* to 25\d"),
    "[-1, 1]": (lambda picture: 2 * picture - 1, r"expected values in \[0, 1\], got -(1|0\.9)"),
    "infinite": (lambda picture: picture / 0, r"expected values in \[0, 1\], got .* to inf"),
}
"""What users pass instead of a tensor in [0, 1] -> how it is made, and what they are told."""


@pytest.mark.parametrize("wrong", PICTURES)
@pytest.mark.parametrize("metric", [psnr, ssim, metrics.lpips_distance])
def test_pictures_of_another_type_or_range_are_refused(metric, wrong):
    image, target = pair()
    make, said = PICTURES[wrong]
    for pictures, name in (((make(image), target), "image"), ((image, make(target)), "target")):
        with pytest.raises(ValueError, match=rf"{metric.__name__}, {name}: {said}") as caught:
            metric(*pictures)
        assert "\n" not in str(caught.value)


def test_an_overshoot_is_a_picture_and_nan_is_a_score():
    image, target = pair()
    assert psnr(image * 1.2 - 0.1, target).isfinite().all()
    assert psnr(torch.full_like(image, math.nan), target).isnan().all()  # a network that diverged


@pytest.mark.parametrize("wrong", ["numpy", "8 bits"])
def test_offsets_of_another_type_are_refused(wrong):
    make, said = PICTURES[wrong]
    offset, true = make(torch.rand(1, 2, 8, 8)), torch.rand(1, 2, 8, 8)
    for refused in (
        lambda: end_point_error(offset, true),
        lambda: resized_end_point_error(offset, true),
        lambda: offset_statistics(offset, torch.ones(1, 1, 8, 8), 2.0),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
