"""A report of two made-up methods on made-up crops, for the tests of report.html."""

import cv2
import numpy as np

from pipelines.reporting.contents import TARGET, Crop, Method, Report, Table

METHODS = ("bicubic of the camera JPG", "SDAN (self)")
HARMFUL = "<script>document.title = 'harmed'</script>"


def crop(number: int, name: str) -> Crop:
    """A random target; bicubic is a blurred form of it, SDAN one with noise; offsets turn around the centre."""
    random = np.random.default_rng(number)
    target = cv2.resize(random.integers(0, 255, (24, 24, 3), np.uint8), (96, 96), interpolation=cv2.INTER_CUBIC)
    blurred = cv2.GaussianBlur(target, (0, 0), 4)
    noisy = np.clip(target + random.normal(0, 6, target.shape), 0, 255).astype(np.uint8)
    rows, cols = np.mgrid[-1:1:24j, -1:1:24j]
    pictures = dict(zip(METHODS, (blurred, noisy), strict=True)) | {TARGET: target}
    return Crop(name, "best" if number == 0 else "worst", pictures, np.stack([cols, -rows]))


def report() -> Report:
    """Two crops, 40 tiles, one table."""
    random = np.random.default_rng(5)
    base = random.normal(26, 2, 40)
    return Report(
        title="Evaluation, simulated data",
        sentences=["SDAN (self) is 0.40 dB above bicubic.", "A second sentence."],
        methods=[Method(METHODS[0], base.tolist()), Method(METHODS[1], (base + random.normal(0.4, 0.5, 40)).tolist())],
        baseline=METHODS[0],
        target="true",
        crops=[crop(0, f"00001/00005-00001@0,0 {HARMFUL}"), crop(1, "00002/00005-00001@0,24")],
        tables=[
            Table(["", "true PSNR", "true SSIM"], [[METHODS[0], "26.00", "0.8000"], [METHODS[1], "26.40", "0.81"]])
        ],
        notes=["RGB in [0, 1]."],
        command="sdan evaluate SHARDS -o DIR",
    )
