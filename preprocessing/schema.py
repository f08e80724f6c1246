"""The shard format, the contract between preprocessing and training. One row is one tile of one pair.

Arrays are binary columns (Parquet would store uint8 tensors as int32, measured 12 times slower to write). Their shapes
and dtypes are in the file's metadata, so any reader can decode them: np.frombuffer(value, dtype).reshape(shape).
t = tile size in packed pixels, s = scale.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict on Python 3.11

from preprocessing.colour import RenderingCurve
from preprocessing.shard_folder.set_aside import why_no_shards
from preprocessing.shard_folder.small_json import SmallJsonError, parse_json
from preprocessing.storage import open_folder

SCHEMA_VERSION = 2
SPLITS = ("train", "val", "test")
_METADATA_KEY = b"sdan"

ARRAYS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lr_raw": ("uint16", ("4", "t", "t")),
    "lr_render": ("uint8", ("3", "2t", "2t")),
    "lr_rgb": ("uint8", ("3", "2t", "2t")),
    "hr_rgb": ("uint8", ("3", "2ts", "2ts")),
    "true_rgb": ("uint8", ("3", "2ts", "2ts")),
    "true_flow": ("float16", ("2", "t", "t")),
    "true_near": ("uint8", ("2", "t", "t")),
}
"""Binary columns: dtype (little-endian) and shape. Those of the truth are null except for simulated pairs, lr_raw and
lr_render for pairs of pictures without RAW."""

RAW_ARRAYS = ("lr_raw", "lr_render")
"""Arrays that only pairs with RAW have."""

_LEVELS = pa.list_(pa.float32(), 4)
COLUMNS: Mapping[str, tuple[pa.DataType, str]] = {
    "sequence": (pa.string(), 'folder of the zoom sequence, e.g. "00134"'),
    "pair": (pa.string(), 'stems of the LR and the HR frame, e.g. "00006-00002"'),
    "lr_raw": (pa.binary(), "uint16 [4, t, t] or null: R, G1, G2, B sensor counts, not normalised, phase always RGGB"),
    "lr_render": (
        pa.binary(),
        "uint8 [3, 2t, 2t] or null: LibRaw's rendering of the tile, sRGB; in files whose options have no curve,"
        " BT.709's curve",
    ),
    "lr_rgb": (pa.binary(), "uint8 [3, 2t, 2t]: the camera JPG of the same area (see lr_source)"),
    "hr_rgb": (pa.binary(), "uint8 [3, 2ts, 2ts]: the long-focal JPG on the LR grid at exactly scale (see hr_source)"),
    "true_rgb": (pa.binary(), "uint8 [3, 2ts, 2ts] or null: simulated only, the ideal picture in the LR frame's view"),
    "true_flow": (
        pa.binary(),
        "float16 [2, t, t] or null: simulated only, (dy, dx) in packed pixels:"
        " the content of hr_rgb at p is at p + flow(p) in lr_raw",
    ),
    "true_near": (
        pa.binary(),
        "uint8 [2, t, t] or null: simulated only, 1 where true_rgb (first) and hr_rgb (second) show the scene's near"
        " plane, 0 where they show the far one",
    ),
    "lr_source": (pa.string(), "camera (lr_rgb is the camera's JPG) or rendering (no JPG: LibRaw's rendering)"),
    "hr_source": (pa.string(), "camera or rendering, the same for hr_rgb"),
    "black_level": (_LEVELS, "counts, R G1 G2 B, from the file; NaN without RAW"),
    "wb": (_LEVELS, "white balance gains, R G1 G2 B, green = 1, from the file"),
    "wb_source": (
        pa.string(),
        "camera (wb is in the file), preview (estimated from the embedded preview) or daylight (LibRaw's for the"
        " camera)",
    ),
    "matrix_source": (
        pa.string(),
        "colour matrix of lr_render: file (in the DNG), libraw (LibRaw's for the camera) or none (camera unknown)",
    ),
    "white_level": (pa.float32(), "counts at which the sensor clips, from the file"),
    "focal_lr_mm": (pa.float32(), "EXIF focal length of the LR frame; null if unknown"),
    "focal_hr_mm": (pa.float32(), "EXIF focal length of the HR frame; null if unknown"),
    "scale": (pa.int32(), "s: hr_rgb has s times the mosaic's resolution"),
    "iso_lr": (pa.float32(), "ISO of the LR frame; null if not in the file"),
    "iso_hr": (pa.float32(), "ISO of the HR frame; null if not in the file"),
    "exposure_lr_s": (pa.float32(), "exposure time of the LR frame; null if not in the file"),
    "exposure_hr_s": (pa.float32(), "exposure time of the HR frame; null if not in the file"),
    "f_number_lr": (pa.float32(), "aperture of the LR frame; null if not in the file"),
    "f_number_hr": (pa.float32(), "aperture of the HR frame; null if not in the file"),
    "exposure_ratio_exif": (
        pa.float32(),
        "light per pixel of HR / LR from the tags: time x ISO / f-number squared; null if one is missing",
    ),
    "exposure_ratio": (
        pa.float32(),
        "the same as measured in linear light at the frames' centre, this pair; NaN if not measurable",
    ),
    "exposure_falloff": (
        pa.float32(),
        "HR's vignetting against LR, this pair: the ratio falls by 1 - exposure_falloff r^2, r from HR's centre in half"
        " diagonals; NaN if not measurable",
    ),
    "jpg_scale": (
        pa.float32(),
        "LR's camera JPG against its RAW, this pair: the content of the RAW at q, from the frame's centre, is in the"
        " JPG at jpg_scale q (1 + jpg_k1 r^2) + jpg_shift, r the length of q in half diagonals; NaN if not measurable",
    ),
    "jpg_k1": (
        pa.float32(),
        "in-camera distortion correction, see jpg_scale; NaN if not measurable (jpg_scale is then a mean over the"
        " area)",
    ),
    "jpg_shift_x": (pa.float32(), "see jpg_scale, mosaic pixels; NaN if not measurable"),
    "jpg_shift_y": (pa.float32(), "see jpg_scale, mosaic pixels; NaN if not measurable"),
    "jpg_falloff": (
        pa.float32(),
        "LR's camera JPG against its RAW, this pair: the JPG's light falls by 1 - jpg_falloff r^2 (below 0: in-camera"
        " vignetting correction); NaN if not measurable",
    ),
    "look_curve": (
        pa.list_(pa.float32()),
        "the look of LR's camera JPG, this pair: sRGB-encoded light of the JPG's values 0, 1/32, ..., 1, before"
        " look_matrix; null if lr_rgb is no JPG or too little of it is unclipped",
    ),
    "look_matrix": (
        pa.list_(pa.float32()),
        "row by row, 3x3, on linear light: decode(lr_render) is nearly look_matrix . decode(look_curve(lr_rgb))",
    ),
    "camera": (pa.string(), "make and model of the LR frame"),
    "row": (pa.int32(), "tile's first row, packed pixels of the LR frame after the phase crop"),
    "col": (pa.int32(), "tile's first column, packed pixels of the LR frame after the phase crop"),
    "origin_row": (
        pa.int32(),
        "rows dropped by the phase crop: mosaic row in LibRaw's visible area = origin_row + 2 row",
    ),
    "origin_col": (pa.int32(), "columns dropped by the phase crop"),
    "lr_to_hr": (
        pa.list_(pa.float64(), 6),
        "a b c d e f: X = a x + b y + c, Y = d x + e y + f; from LR mosaic (x, y) in LibRaw's visible area, sensor"
        " orientation, to the stored pixels of the HR JPG; pixel i covers [i, i + 1); with ecc the affine nearest to"
        " lr_to_hr_lens over this tile",
    ),
    "lr_to_hr_lens": (
        pa.list_(pa.float64(), 12),
        "the map used to sample hr_rgb, this pair: a b c d e f as in lr_to_hr give h; then centre (2), unit,"
        " k, tilt (2): q = (h - centre) / unit, (X, Y) = h + unit q (k r^2 + tilt . q), r the length of q; k and tilt"
        " are 0 without ecc",
    ),
    "aligned_by": (
        pa.string(),
        "scale (focal lengths only), ecc (registered), scale_fallback (ecc was asked for and failed), or unaligned"
        " (the pictures neither correlate nor register; only with --keep-unaligned)",
    ),
    "align_score": (
        pa.float32(),
        "correlation of lr_rgb and the low-passed hr_rgb, luminance, this tile; NaN if a picture is flat",
    ),
    "residual_px": (
        pa.float32(),
        "measured residual shift between lr_rgb and hr_rgb, HR pixels, this tile; NaN if not measurable",
    ),
}
"""Every column in file order: Arrow type and meaning. docs/shards.md repeats this table; a test compares them."""

SCHEMA = pa.schema([pa.field(name, kind) for name, (kind, _) in COLUMNS.items()])


class _Version(TypedDict):
    """What every version's metadata says."""

    schema_version: NotRequired[int]


class _Described(TypedDict):
    """What `encode` stores in a file's metadata, as far as it is read."""

    tile_px: Annotated[int, Field(ge=1, le=2**16)]
    scale: Annotated[int, Field(ge=1, le=2**8)]
    options: dict[str, Any]


class SchemaError(ValueError):
    """This version cannot read a shard folder or file. The message is one line and says why."""


@dataclass(frozen=True)
class ShardInfo:
    """The properties that all shards of one folder share."""

    tile_px: int
    """t, packed pixels."""
    scale: int
    """s."""
    options: Mapping[str, Any]
    """The options of `preprocess` that made the shards (`PreprocessOptions.shard_options`)."""
    schema_version: int = SCHEMA_VERSION

    @property
    def has_raw(self) -> bool:
        """Whether the pairs have RAW; without it only networks of RGB input can use them."""
        return self.options.get("raw") != "none"

    @property
    def rendering_curve(self) -> RenderingCurve:
        """The curve of lr_render. Shards made before version 0.3 do not state it; theirs is bt709."""
        return stated_curve(self.options)

    def shape(self, column: str) -> tuple[int, ...]:
        """The array shape of a binary column, e.g. lr_raw -> (4, 96, 96)."""
        sizes = {"t": self.tile_px, "2t": 2 * self.tile_px, "2ts": 2 * self.tile_px * self.scale}
        return tuple(sizes[axis] if axis in sizes else int(axis) for axis in ARRAYS[column][1])


def stated_curve(options: Mapping[str, Any]) -> RenderingCurve:
    """The curve of renderings that were made with these `shard_options`."""
    curve: RenderingCurve = options.get("curve", "bt709")
    return curve


def encode(rows: Iterable[Mapping[str, Any]], info: ShardInfo) -> pa.Table:
    """Convert rows (column name -> numpy array, scalar or None) to an Arrow table whose metadata describes the arrays.

    Raises SchemaError if an array has the wrong dtype or shape.
    """
    table = pa.Table.from_pylist([_encode_row(row, info) for row in rows], schema=SCHEMA)
    arrays = {name: {"dtype": dtype, "shape": info.shape(name)} for name, (dtype, _) in ARRAYS.items()}
    described = {
        "schema_version": info.schema_version,
        "tile_px": info.tile_px,
        "scale": info.scale,
        "options": dict(info.options),
        "arrays": arrays,
        "columns": {name: meaning for name, (_, meaning) in COLUMNS.items()},
    }
    return table.replace_schema_metadata({_METADATA_KEY: json.dumps(described, sort_keys=True).encode()})


def decode(row_or_batch: Mapping[str, Any], info: ShardInfo) -> dict[str, Any]:
    """Decode columns to numpy: of one row, or of a batch (column name -> sequence of values), stacked on axis 0.

    Arrays of a single row are read-only views; a batch is copied. A null array or list becomes None; so does a batch
    with a null in any row. Null scalars become NaN. Strings and unknown columns are returned unchanged.
    """
    return {name: _decode_column(name, value, info) for name, value in row_or_batch.items()}


def read_info(shards: str) -> ShardInfo:
    """Read the properties that all shards in the folder or `s3://` URI `shards` share, from the first shard's metadata.

    Raises SchemaError if there are no shards, or if they have another schema version.
    """
    paths = list_shards(shards)
    if not paths:
        set_aside = why_no_shards(open_folder(shards))
        got = f"none: {set_aside}" if set_aside else "none"
        raise SchemaError(
            f"{shards}: expected shards (split=*/*.parquet), got {got}; run: sdan preprocess RAW {shards}"
        )
    return info_of(pq.read_schema(paths[0], filesystem=open_folder(shards).filesystem), paths[0])


def info_of(schema: pa.Schema, path: str) -> ShardInfo:
    """The ShardInfo in a shard's Arrow schema; `path` is for messages."""
    stored = (schema.metadata or {}).get(_METADATA_KEY, b"{}")
    try:
        version = parse_json(stored, f"{path}, metadata", _Version).get("schema_version", "none")
        if version != SCHEMA_VERSION:
            raise SchemaError(
                f"{path}: expected schema version {SCHEMA_VERSION}, got {version}; "
                "preprocess again into an empty folder"
            )
        described = parse_json(stored, f"{path}, metadata", _Described)
    except SmallJsonError as error:
        raise SchemaError(f"{error}; delete the file and preprocess again") from error
    return ShardInfo(described["tile_px"], described["scale"], described["options"])


def list_shards(shards: str, split: str | None = None) -> list[str]:
    """Sorted paths of the finished shards of `split` (train, val, test; None: all) in a folder or `s3://` URI.

    The paths are for the pyarrow filesystem of `shards`: on S3 they have no scheme. [] if the folder does not exist.
    """
    if split is not None and split not in SPLITS:
        raise SchemaError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    folder = open_folder(shards)
    paths = []
    for name in SPLITS if split is None else (split,):
        paths += [entry.path for entry in folder.files(f"split={name}") if is_shard(entry.base_name)]
    return sorted(paths)


def is_shard(name: str) -> bool:
    """Whether a file of this name is a finished shard; files being written start with a dot."""
    return name.endswith(".parquet") and not name.startswith(".")


def _encode_row(row: Mapping[str, Any], info: ShardInfo) -> dict[str, Any]:
    if set(row) != set(COLUMNS):
        raise SchemaError(f"row: expected columns {sorted(COLUMNS)}, got {sorted(row)}")
    return {name: _encode_value(name, row[name], info) for name in COLUMNS}


def _encode_value(name: str, value: Any, info: ShardInfo) -> Any:
    if value is None or name not in ARRAYS:
        return value.tolist() if isinstance(value, np.ndarray) else value
    dtype, shape = np.dtype(ARRAYS[name][0]), info.shape(name)
    if value.dtype != dtype or value.shape != shape:
        raise SchemaError(f"{name}: expected {dtype}{list(shape)}, got {value.dtype}{list(value.shape)}")
    return value.astype(dtype.newbyteorder("<"), copy=False).tobytes()


def _decode_column(name: str, value: Any, info: ShardInfo) -> Any:
    single = value is None or isinstance(value, bytes | bytearray | memoryview | str) or np.isscalar(value)
    if name in ARRAYS:
        dtype, shape = np.dtype(ARRAYS[name][0]).newbyteorder("<"), info.shape(name)
        if single:
            return None if value is None else np.frombuffer(value, dtype).reshape(shape)
        values = list(value)
        if any(item is None for item in values):
            return None
        flat = np.frombuffer(b"".join(values), dtype)
        return flat.reshape(len(values), *shape)
    kind = COLUMNS[name][0] if name in COLUMNS else pa.string()
    if pa.types.is_string(kind):
        return value
    target = _numpy_type(kind)
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        if value is None or any(item is None for item in value):
            return None
        return np.asarray(list(value) if _nested(value) else value, target)
    if value is None:
        return np.asarray(np.nan, target)
    if single:
        return np.asarray(value, target)
    return np.asarray([np.nan if item is None else item for item in value], target)


def _nested(value: Sequence[Any]) -> bool:
    return len(value) > 0 and not np.isscalar(value[0])


def _numpy_type(kind: pa.DataType) -> np.dtype[Any]:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return np.dtype(kind.to_pandas_dtype())
