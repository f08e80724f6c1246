"""The preset wide: one camera per sequence, drawn from the ranges of cameras in use.

A network that has seen one camera only is sure of what other cameras break: it turned the aliasing of a lens without
low-pass filter into dashes, and took a JPG's halos for detail. So this preset draws optics, noise, levels, colours and
the JPG's look (`camera_jpg.py`) anew for each sequence.

Sources of the ranges
    noise     the model of Wei et al., A Physics-Based Noise Formation Model, CVPR 2020 (ELD): photons, read noise, row
              noise, rounding. The sizes are round numbers that should enclose cameras in use, from a phone's pixel
              (8,000 electrons at ISO 100) to full frame (90,000): 1 to 4 electrons of read noise before the amplifier,
              up to 3 counts of 14 bit after it. No camera was measured
    colours   published ColorMatrix values for D65 (Adobe, as in the tables of dcraw and LibRaw)
    levels    black and white levels of the kinds that files have (10 to 16 bit), not of the models in MATRICES
    lens      0.3 px is a good lens at its best aperture without low-pass filter: with the pixel's area (0.29 px) it
              passes 0.43 of the contrast at the mosaic's limit. 1.2 px is a zoom at its end, or diffraction at f/16 on
              small pixels. Lateral colour of 1.5 px at the corners is a cheap zoom's, uncorrected
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from preprocessing.colour import srgb_to_camera
from preprocessing.raw.dng import CFA_CODES
from preprocessing.simulator.optics import FOCALS_MM, Preset
from preprocessing.truth.frame import Exposure

MATRICES: dict[str, tuple[int, ...]] = {
    "Canon EOS 5D": (6347, -479, -972, -8297, 15954, 2480, -1968, 2131, 7649),
    "Canon EOS 5D Mark II": (4716, 603, -830, -7798, 15474, 2480, -1496, 1937, 6651),
    "Canon EOS 5D Mark III": (6722, -635, -963, -4287, 12460, 2028, -908, 2162, 5668),
    "Canon EOS 5DS": (6250, -711, -808, -5153, 12794, 2636, -1249, 2198, 5610),
    "Canon EOS 7D Mark II": (7268, -1082, -969, -4186, 11839, 2663, -825, 2029, 5839),
    "Nikon D600": (8178, -2245, -609, -4857, 12394, 2776, -1207, 2086, 7298),
    "Nikon D700": (8139, -2171, -663, -8747, 16541, 2295, -1925, 2008, 8093),
    "Nikon D7200": (8322, -3112, -1047, -6367, 14342, 2179, -988, 1638, 6394),
    "Nikon D810": (9369, -3195, -791, -4488, 12430, 2301, -893, 1796, 6872),
    "Olympus E-M5": (8380, -2630, -639, -2887, 10725, 2496, -627, 1427, 5438),
    "Olympus E-M5MarkII": (9422, -3258, -711, -2655, 10898, 2015, -512, 1354, 5512),
    "Olympus SH-2": (10156, -3425, -1077, -2611, 11177, 1624, -385, 1592, 5080),
    "Sony ILCE-7": (5271, -712, -347, -6153, 13653, 2763, -1601, 2366, 7242),
    "Sony ILCE-7RM2": (6629, -1900, -483, -4618, 12349, 2550, -622, 1381, 6514),
    "Sony ILCE-6300": (5973, -1695, -419, -3826, 11797, 2293, -639, 1398, 5789),
    "Sony ILCE-7SM2": (5838, -1430, -246, -3497, 11477, 2297, -748, 1885, 5778),
}
"""XYZ -> camera, times 10,000, row by row."""
LEVELS = ((512, 16383), (2048, 15488), (600, 16383), (64, 16383), (128, 3692), (256, 4065), (143, 4095), (64, 1023),
          (512, 65535))  # fmt: skip
"""(black, white), counts: four of 14 bit, three of 12 bit, a phone's 10 bit, a cinema camera's 16 bit."""

PSF_PX = (0.3, 1.2)
"""Lens blur at the axis, standard deviation. Drawn evenly in its logarithm: half of the cameras alias clearly."""
PSF_RISE = (0.0, 0.5)
"""Blur added at the corner, relative to the axis."""
HALO = (0.0, 0.2)
"""Light that spherical aberration spreads widely; half of the lenses have none."""
HALO_PX = (1.5, 4.0)
LATERAL_PX = 1.5
"""Largest shift of red or blue against green, half a diagonal from the axis."""
AXIS = 0.85
"""Largest distance of the axis from the frame's centre, half diagonals. Training tiles come from the centre of a frame;
with the axis elsewhere they show what corners show."""
DEFOCUS_PX, DEFOCUS_SHARE = (0.3, 1.0), 0.2
MOTION_PX, MOTION_SHARE = (0.5, 2.5), 0.15
FULL_WELL_E = (8_000.0, 90_000.0)
READ_E = (1.0, 4.0)
READ_14BIT = (0.3, 3.0)
ROW_SHARE = (0.02, 0.25)
"""Row noise relative to read noise."""
HOT_SHARE = (1e-6, 1e-4)
"""Pixels with a dark current far above the others'; more are removed by the cameras themselves."""
ISO = (100, 12_800)
LEAST_WHITE_E = 250.0
"""Electrons at white below which no camera offers an ISO: a phone's pixel ends near ISO 3200."""
RED_GAIN, BLUE_GAIN = (1.25, 2.7), (1.15, 2.9)
"""White balance from lamps (little red gain, much blue) to shade."""
GAIN = (0.35, 1.7)
"""Scene white relative to the sensor's: above 1 highlights clip, below 0.7 the frame is underexposed."""


@dataclass(frozen=True)
class CameraModel:
    """One camera with its lens. Lengths are RAW pixels; the field is in half diagonals of the frame from the axis."""

    colours: str
    """Key of MATRICES."""
    cfa: str
    black_level: int
    white_level: int
    full_well_e: float
    """Electrons at white, ISO 100."""
    read_e: float
    """Read noise before the amplifier, electrons."""
    read_counts: float
    """Read noise after it, counts."""
    row_share: float
    hot_share: float
    psf_px: float
    psf_rise: float
    halo: float
    halo_px: float
    lateral_px: tuple[float, float]
    """Shift of red and of blue at field 1; positive is outwards."""
    axis: tuple[float, float]
    """(x, y) of the frame's centre in the field."""
    defocus_px: float
    motion_px: float
    """Length of the path of a point during the exposure."""
    motion_rad: float

    @property
    def xyz_to_camera(self) -> npt.NDArray[np.float64]:
        return np.array(MATRICES[self.colours], np.float64).reshape(3, 3) / 10_000

    @property
    def rgb_to_camera(self) -> npt.NDArray[np.float64]:
        """[3, 3] linear sRGB -> white-balanced camera colours."""
        return srgb_to_camera(self.xyz_to_camera)

    def electrons_per_count(self, iso: float) -> float:
        return self.full_well_e * 100 / iso / (self.white_level - self.black_level)

    def read_noise_counts(self, iso: float) -> float:
        """Standard deviation without light, without row noise and rounding."""
        return float(np.hypot(self.read_e / self.electrons_per_count(iso), self.read_counts))


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(limits))))


def draw_camera(rng: np.random.Generator) -> CameraModel:
    black, white = LEVELS[int(rng.integers(len(LEVELS)))]
    lateral = LATERAL_PX * rng.uniform(-1, 1, 2)
    distance, angle = AXIS * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
    return CameraModel(
        colours=str(rng.choice(list(MATRICES))),
        cfa=str(rng.choice(list(CFA_CODES))),
        black_level=black,
        white_level=white,
        full_well_e=_log_uniform(rng, FULL_WELL_E),
        read_e=_log_uniform(rng, READ_E),
        read_counts=_log_uniform(rng, READ_14BIT) * (white - black) / 16383,
        row_share=_log_uniform(rng, ROW_SHARE),
        hot_share=_log_uniform(rng, HOT_SHARE),
        psf_px=_log_uniform(rng, PSF_PX),
        psf_rise=float(rng.uniform(*PSF_RISE)),
        halo=float(rng.uniform(*HALO) * (rng.random() < 0.5)),
        halo_px=float(rng.uniform(*HALO_PX)),
        lateral_px=(float(lateral[0]), float(lateral[1])),
        axis=(float(distance * np.cos(angle)), float(distance * np.sin(angle))),
        defocus_px=float(rng.uniform(*DEFOCUS_PX) * (rng.random() < DEFOCUS_SHARE)),
        motion_px=float(rng.uniform(*MOTION_PX) * (rng.random() < MOTION_SHARE)),
        motion_rad=float(rng.uniform(0, np.pi)),
    )


def as_arw(camera: CameraModel) -> CameraModel:
    """The camera with the pattern, levels and colours that LibRaw assumes for our ARW files."""
    black, white = LEVELS[0]
    counts = camera.read_counts * (white - black) / (camera.white_level - camera.black_level)
    return replace(
        camera, colours="Sony ILCE-7SM2", cfa="RGGB", black_level=black, white_level=white, read_counts=counts
    )


def draw_exposures(rng: np.random.Generator, preset: Preset, camera: CameraModel) -> list[Exposure]:
    """One exposure per focal length in FOCALS_MM: the same light and settings, with the light meter's scatter."""
    highest = min(ISO[1], camera.full_well_e * 100 / LEAST_WHITE_E)
    iso = round(ISO[0] * (highest / ISO[0]) ** float(rng.beta(1, 1.5)))
    warmth = rng.random()
    red = RED_GAIN[0] + warmth * (RED_GAIN[1] - RED_GAIN[0])
    blue = float(np.clip(BLUE_GAIN[1] - warmth * (BLUE_GAIN[1] - BLUE_GAIN[0]) + 0.2 * rng.normal(), *BLUE_GAIN))
    gain, f_number, shutter = _log_uniform(rng, GAIN), float(rng.choice([2.8, 4, 5.6, 8, 11])), rng.choice([60, 250])
    exposures = []
    for focal in FOCALS_MM:
        step = 2.0 ** (preset.exposure_ev * float(rng.normal()))
        exposures.append(
            Exposure(
                iso=iso,
                exposure_s=1.0 / round(float(shutter) / step),
                f_number=f_number,
                gain=gain * step,
                # ARW stores gains as multiples of 1/1024.
                wb=(round(1024 * red) / 1024, 1.0, round(1024 * blue) / 1024),
                psf_px=float(np.hypot(camera.psf_px * rng.uniform(0.95, 1.05), camera.defocus_px)),
                vignetting=float(rng.uniform(0.8, 1.2)) * float(np.interp(focal, [24, 70, 240], [0.32, 0.16, 0.24])),
            )
        )
    return exposures
