"""Pictures are read as sRGB: profiles, EXIF's colour space, grey, transparency, 16 bits; damaged ones are refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from preprocessing.colour import linear_to_srgb, srgb_to_linear
from preprocessing.raw import tiff
from preprocessing.raw.picture import Picture, PictureError, colour_space, read_picture
from preprocessing.raw.profiles import icc

P3_TO_XYZ_D50 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
GAMMA = 563 / 256
ADOBE, P3 = (icc.ADOBE_RGB_TO_XYZ_D50, GAMMA), (P3_TO_XYZ_D50, GAMMA)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
COLOURS = np.array([[[200, 60, 50], [30, 140, 60], [20, 40, 190]], [[128] * 3, [10, 200, 220], [255] * 3]], np.uint8)


def profile(to_xyz_33, gamma, name="Wide RGB", curve=None):
    """A minimal ICC profile, version 2: a matrix, and one gamma or a curve tag."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + b"\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        b"TRC": curve or b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)),
    }
    tags |= {colour + b"XYZ": xyz(column) for colour, column in zip((b"r", b"g", b"b"), to_xyz_33.T, strict=True)}
    curves = {colour + b"TRC": tags[b"TRC"] for colour in (b"r", b"g", b"b")}
    tags = {key: value for key, value in tags.items() if key != b"TRC"} | curves
    start, table, data = 132 + 12 * len(tags), b"", b""
    for key, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += key + struct.pack(">II", start + len(data), len(value))
        data += padded
    header = struct.pack(">I4sI4s4s4s", start + len(data), bytes(4), 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + xyz((0.9642, 1.0, 0.8249))[8:] + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + data


def xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, **options)
    return out.getvalue()


def wanted(picture, to_xyz_33, gamma):
    """The same colours in sRGB, worked out directly, in [0, 1]."""
    top = np.iinfo(picture.dtype).max
    srgb = np.linalg.inv(icc._SRGB_TO_XYZ_D50) @ to_xyz_33
    linear = np.clip((picture / top) ** gamma @ srgb.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def blocks(picture, side=16):
    return np.repeat(np.repeat(picture, side, 0), side, 1)


@pytest.mark.parametrize("space", [ADOBE, P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_embedded_profiles_are_converted(kind, space):
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(blocks(COLOURS), kind, icc_profile=profile(*space, name="Wide"), **options)
    read = read_picture(data, "x")
    expected = 255 * wanted(COLOURS, *space)
    assert np.abs(read.pixels_HWC[8::16, 8::16] - expected).max() <= (3 if kind == "JPEG" else 1.01)
    assert np.abs(expected - COLOURS).max() > 15 and read.notes == ("colours converted from Wide to sRGB",)


def test_the_issues_colour_comes_back():
    """(200, 60, 50) of sRGB stored in Adobe RGB is (180, 62, 55); read, it is the first again."""
    stored = np.full((16, 16, 3), (200, 60, 50), np.uint8)
    adobe = ImageCms.ImageCmsProfile(io.BytesIO(profile(*ADOBE)))
    stored = np.asarray(ImageCms.profileToProfile(Image.fromarray(stored), ImageCms.createProfile("sRGB"), adobe))
    assert abs(int(stored[0, 0, 0]) - 200) > 10
    read = read_picture(encoded(stored, icc_profile=profile(*ADOBE)), "x").pixels_HWC
    assert np.abs(read.astype(int) - (200, 60, 50)).max() <= 2


def with_exif(space, index=None, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0131] = "an editor"
    exif.get_ifd(0x8769)[0xA001] = space
    if index:
        exif.get_ifd(0x8769)[0xA005] = {1: index}
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    return encoded(blocks(COLOURS), kind, exif=exif, **options)


@pytest.mark.parametrize(
    ("space", "index", "converted"),
    [(65535, None, True), (65535, "R03", True), (2, None, True), (65535, "R98", False), (1, None, False)],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_states_adobe_rgb_where_no_profile_is(kind, space, index, converted):
    data = with_exif(space, index, kind)
    read = read_picture(data, "x")
    expected = 255 * wanted(COLOURS, *ADOBE) if converted else COLOURS.astype(float)
    assert np.abs(read.pixels_HWC[8::16, 8::16] - expected).max() <= 3
    assert bool(read.notes) == converted
    if kind == "JPEG":
        assert colour_space(data) == ("Adobe RGB" if converted else None)


def with_chunks(png, *chunks):
    """The PNG with chunks of (kind, data) after its header."""
    packed = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return png[:33] + packed + png[33:]


def chromaticities(*numbers):
    return b"cHRM", struct.pack(">8I", *(round(number * 100_000) for number in numbers))


P3_COLOURS = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
SRGB_COLOURS = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("chunks", "light", "matrix"),
    [
        ([(b"cICP", bytes((12, 13, 0, 1)))], srgb_to_linear, P3_TO_XYZ_D50),
        ([(b"cICP", bytes((1, 8, 0, 1)))], lambda x: x, icc._SRGB_TO_XYZ_D50),
        ([(b"gAMA", struct.pack(">I", 55556))], lambda x: x**1.8, icc._SRGB_TO_XYZ_D50),
        ([(b"gAMA", struct.pack(">I", 45455)), chromaticities(*P3_COLOURS)], lambda x: x**2.2, P3_TO_XYZ_D50),
        ([chromaticities(*P3_COLOURS)], srgb_to_linear, P3_TO_XYZ_D50),
    ],
)
def test_colours_stated_by_a_pngs_numbers_are_converted(chunks, light, matrix, deep):
    picture = blocks(COLOURS).astype(np.uint16) * 257 if deep else blocks(COLOURS)
    read = read_picture(with_chunks(deep_png(picture) if deep else encoded(picture), *chunks), "x.png")
    top = np.iinfo(picture.dtype).max
    linear = light(picture / top) @ (np.linalg.inv(icc._SRGB_TO_XYZ_D50) @ matrix).T
    expected = linear_to_srgb(np.clip(linear, 0, 1))
    assert np.abs(read.pixels_HWC / top - expected).max() < 1.5 / 255 and "to sRGB" in read.notes[0]


def srgb_chunks():
    numbers = [(b"gAMA", struct.pack(">I", 45455)), chromaticities(*SRGB_COLOURS)]
    odd = [(b"gAMA", bytes(4)), (b"cHRM", bytes(32))]
    return [[(b"cICP", bytes((1, 13, 0, 1)))], numbers, [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 99999))], odd]


@pytest.mark.parametrize("chunks", srgb_chunks())
def test_a_png_that_states_srgb_stays_as_it_is(chunks):
    read = read_picture(with_chunks(encoded(COLOURS), *chunks), "x.png")
    assert np.array_equal(read.pixels_HWC, COLOURS) and read.notes == ()


def test_high_dynamic_range_is_refused():
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        png = with_chunks(encoded(COLOURS), (b"cICP", bytes((9, transfer, 0, 1))))
        with pytest.raises(PictureError, match=rf"^x.png: expected .* dynamic range, got HDR \({name}\); export it"):
            read_picture(png, "x.png")


def test_an_avif_that_states_display_p3_is_converted():
    avif = encoded(blocks(COLOURS), "AVIF", quality=95, subsampling="4:4:4")
    at = avif.find(b"colrnclx") + 8
    p3 = avif[:at] + struct.pack(">HH", 12, 13) + avif[at + 4 :]
    linear = srgb_to_linear(blocks(COLOURS) / 255) @ (np.linalg.inv(icc._SRGB_TO_XYZ_D50) @ P3_TO_XYZ_D50).T
    read = read_picture(p3, "x.avif")
    assert np.abs(read.pixels_HWC / 255 - linear_to_srgb(np.clip(linear, 0, 1))).mean() < 3 / 255
    assert read.notes == ("colours converted from Display P3 to sRGB",)


def test_a_profile_outranks_exif():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 65535
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = read_picture(encoded(COLOURS, exif=exif, icc_profile=srgb), "x")
    assert np.array_equal(read.pixels_HWC, COLOURS) and read.notes == ()


def test_a_damaged_profile_counts_as_srgb():
    for damaged in (b"x", profile(*ADOBE)[:150], b"\0" * 400):
        assert np.array_equal(read_picture(encoded(COLOURS, icc_profile=damaged), "x").pixels_HWC, COLOURS)


def deep_png(picture_HWC, icc_profile=None):
    """A 16-bit PNG; `icc_profile` is put in as an iCCP chunk."""
    import zlib

    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}
    channels = order.get(picture_HWC.shape[-1], [0])
    data = cv2.imencode(".png", np.ascontiguousarray(picture_HWC[..., channels]))[1].tobytes()
    if icc_profile is None:
        return data
    body = b"iCCP" + b"p\0\0" + zlib.compress(icc_profile)
    return data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def deep_tiff(picture_HWC, orientation=1):
    """An uncompressed 16-bit TIFF."""
    height, width = picture_HWC.shape[:2]
    ifd = tiff.Ifd()
    for tag, value in ((256, width), (257, height), (259, 1), (262, 2), (274, orientation), (277, 3), (278, height)):
        ifd.set(tag, tiff.SHORT, value)
    ifd.set(258, tiff.SHORT, 16, 16, 16)
    ifd.blobs[273] = (picture_HWC.astype("<u2") * 257).tobytes()
    ifd.set(279, tiff.LONG, 6 * height * width)
    return tiff.serialise(ifd)


def test_16_bits_stay_16_bits():
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    for data in (deep_png(deep), cv2.imencode(".tif", np.ascontiguousarray(deep[..., ::-1]))[1].tobytes()):
        read = read_picture(data, "x")
        assert read.pixels_HWC.dtype == np.uint16 and np.array_equal(read.pixels_HWC, deep)
    grey = read_picture(deep_png(deep[..., :1]), "x").pixels_HWC
    assert np.array_equal(grey, np.repeat(deep[..., :1], 3, 2))


@pytest.mark.parametrize("space", [ADOBE, P3], ids=["adobe", "p3"])
def test_16_bits_are_converted_in_16_bits(space):
    deep = np.random.default_rng(0).integers(0, 65536, (300, 30, 3)).astype(np.uint16)
    read = read_picture(deep_png(deep, profile(*space)), "x")
    assert np.abs(read.pixels_HWC - 65535 * wanted(deep, *space)).max() < 40  # of 65535; the profile's own rounding
    assert read.pixels_HWC.dtype == np.uint16


@pytest.mark.parametrize(
    ("curve", "light"),
    [
        (b"curv" + bytes(4) + struct.pack(">I", 0), lambda x: x),
        (b"curv" + bytes(4) + struct.pack(">I5H", 5, 0, 2000, 16000, 36000, 65535), None),
        (b"para" + bytes(4) + struct.pack(">HHi", 0, 0, round(1.8 * 65536)), lambda x: x**1.8),
        (
            b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(v * 65536) for v in SRGB_CURVE)),
            lambda x: np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4),
        ),
    ],
)  # fmt: skip
def test_every_kind_of_curve_agrees_with_littlecms(curve, light):
    made = profile(P3_TO_XYZ_D50, 0, curve=curve)
    found = icc.read_matrix_profile(made)
    if light is not None:
        x = np.linspace(0, 1, 65536)
        assert np.abs(found.curves[0] - light(x)).max() < 1e-4
    eight = read_picture(encoded(COLOURS, icc_profile=made), "x").pixels_HWC
    assert np.abs(eight.astype(int) - found.to_srgb(COLOURS)).max() <= 1


def test_grey_profiles_apply_to_grey_pictures_only():
    made = profile(icc.ADOBE_RGB_TO_XYZ_D50, 1.0).replace(b"RGB XYZ ", b"GRAYXYZ ", 1).replace(b"rTRC", b"kTRC", 1)
    grey = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
    read = read_picture(encoded(grey, icc_profile=made), "x")
    assert read.pixels_HWC[..., 0].astype(int).min() == 0 and read.pixels_HWC[1, 1, 0] > grey[1, 1] + 40
    assert np.array_equal(read_picture(encoded(COLOURS, icc_profile=made), "x").pixels_HWC, COLOURS)


def test_grey_palette_and_transparency():
    grey = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
    assert np.array_equal(read_picture(encoded(grey), "x").pixels_HWC, np.repeat(grey[..., None], 3, 2))
    out = io.BytesIO()
    Image.fromarray(COLOURS).quantize(8).save(out, "PNG")
    assert np.abs(read_picture(out.getvalue(), "x").pixels_HWC.astype(int) - COLOURS).max() <= 3
    alpha = np.array([[255, 128, 0], [255, 255, 255]], np.uint8)
    for picture in (np.dstack([COLOURS, alpha]), np.dstack([COLOURS, alpha]).astype(np.uint16) * 257):
        top = np.iinfo(picture.dtype).max
        read = read_picture(deep_png(picture) if top > 255 else encoded(picture), "x")
        share = alpha[..., None] / 255
        expected = (COLOURS * share + 255 * (1 - share)) * (top / 255)
        assert np.abs(read.pixels_HWC - expected).max() <= top / 255
        assert read.notes == ("transparent parts composited on white",)
    opaque = read_picture(encoded(np.dstack([COLOURS, np.full_like(alpha, 255)])), "x")
    assert np.array_equal(opaque.pixels_HWC, COLOURS) and opaque.notes == ()


def wiped(avif):
    """An AVIF whose coded picture is lost, as after a bad sector."""
    at = avif.find(b"mdat") + 4
    return avif[:at] + b"\xff" * (len(avif) - at)


def test_unusable_pictures_are_refused_in_one_line():
    good = encoded(blocks(COLOURS))
    cmyk = io.BytesIO()
    Image.fromarray(COLOURS).convert("CMYK").save(cmyk, "JPEG")
    for data, said in (
        (b"", "expected a readable JPG, PNG, TIFF, WebP or AVIF, got an empty file; export it again"),
        (b"some text", "got another kind of file"),
        (bytes(4) + b"ftypheic" + bytes(20), "got HEIC data"),
        (b"\0\0\0\x18ftypheic" + bytes(90), "got HEIC data"),
        (cmyk.getvalue(), "expected an RGB or grey picture, got CMYK; export it as sRGB"),
        (good[: len(good) // 2], "copy or export it again"),
        (
            encoded(blocks(COLOURS), "TIFF", compression="tiff_lzw")[:-20],
            "expected a complete TIFF or RAW, got a damaged one",
        ),
        (encoded(blocks(COLOURS), "AVIF")[:150], "expected a complete AVIF, got a damaged one"),
        (wiped(encoded(blocks(COLOURS), "AVIF")), "copy or export it again"),
        (deep_png(np.random.default_rng(0).integers(0, 65536, (64, 64, 3)).astype(np.uint16))[:9000], "copy or export"),
    ):
        with pytest.raises(PictureError, match=r"^a\.png: expected [^\n]+$") as caught:
            read_picture(data, "a.png")
        assert said in str(caught.value)
    with pytest.raises(PictureError, match="expected a readable JPG, got PNG data"):
        read_picture(good, "a.jpg", kinds=("JPG",))


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "all chroma": {"subsampling": 0, "optimize": True},
}


def detailed_jpg(**options):
    """120 KB of compressed data."""
    picture = np.random.default_rng(5).integers(0, 256, (80, 120, 3), np.uint8)
    return encoded(cv2.resize(picture, (480, 320), interpolation=cv2.INTER_CUBIC), "JPEG", quality=95, **options)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("damage", ["zeros", "random", "cut out"])
def test_damage_inside_a_jpg_is_refused(kind, damage):
    """Pillow decodes such files without a word: shifted, grey or coloured blocks from there on."""
    good = detailed_jpg(**JPEGS[kind])
    refused = 0
    for place in np.linspace(0.2, 0.8, 6):
        at = int(len(good) * place) // 512 * 512
        instead = {"zeros": bytes(4096), "random": np.random.default_rng(at).bytes(4096), "cut out": b""}[damage]
        try:
            read_picture(good[:at] + instead + good[at + 4096 :], "a.jpg")
        except PictureError as error:
            refused += 1
            assert str(error).endswith("; copy or export it again") and str(error).startswith("a.jpg: expected ")
    assert refused >= 5


@pytest.mark.parametrize("kind", JPEGS)
def test_harmless_bytes_in_a_jpg_are_accepted(kind):
    good = detailed_jpg(**JPEGS[kind])
    pixels = read_picture(good, "a.jpg").pixels_HWC
    preview = struct.pack(">H", len(good[:60000]) + 2) + good[:60000]
    for data in (
        good[:-2] + bytes(2000) + good[-2:],  # padding before the end
        good[:-2] + b"\xff" * 7 + good[-2:],
        good[:-2] + b"slop" + good[-2:],
        good + good,  # a second picture
        good + bytes(1000),
        good[:2] + b"\xff\xe9" + preview + good[2:],
    ):
        assert np.array_equal(read_picture(data, "a.jpg").pixels_HWC, pixels)


def test_every_intact_jpg_counts_as_intact():
    picture = cv2.resize(np.random.default_rng(7).integers(0, 256, (9, 13, 3), np.uint8), (173, 91))
    for quality in (5, 60, 100):
        for subsampling in (0, 1, 2):
            for options in JPEGS.values():
                data = encoded(picture, "JPEG", **{"quality": quality, "subsampling": subsampling, **options})
                assert read_picture(data, "a.jpg").size == (91, 173)
    assert read_picture(encoded(picture[..., 0], "JPEG"), "a.jpg").grey
    assert read_picture(encoded(picture[:1, :1], "JPEG"), "a.jpg").size == (1, 1)


def test_size_is_checked_before_memory_is_taken():
    import zlib

    header = struct.pack(">II5B", 40000, 30000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    png = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(PictureError, match="at most 400 megapixels, got 40000x30000 = 1200; reduce or crop it"):
        read_picture(png, "a.png")
    with pytest.raises(PictureError, match="at most 0 megapixels, got 48x32"):
        read_picture(encoded(blocks(COLOURS)), "a.png", max_pixels=1000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_and_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(COLOURS, exif=exif)))))
    read = read_picture(encoded(COLOURS, exif=exif), "x")
    assert read.orientation == orientation and read.size == (2, 3)
    assert np.array_equal(read.upright_HWC, upright)
    # Decoders turn a TIFF themselves.
    assert np.array_equal(read_picture(encoded(COLOURS, "TIFF", exif=exif), "x").upright_HWC, upright)
    assert np.array_equal(read_picture(deep_tiff(COLOURS, orientation), "x").upright_HWC, upright * np.uint16(257))
    assert np.array_equal(Picture(COLOURS, None).upright_HWC, COLOURS)
