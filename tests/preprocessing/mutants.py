"""Random damage to RAW and JPG files, like that of bad disks, cables, interrupted copies and faulty firmware."""

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

EDGES = (0, 1, 2, 3, 8, 255, 4095, 32767, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
DIMENSIONS = (256, 257)
OFFSETS = (273, 513, 330, 34665)
COUNTS = (279, 514, 278, 277)
MAKERS = (
    *(b"Canon", b"NIKON CORPORATION", b"FUJIFILM", b"Panasonic", b"OLYMPUS", b"PENTAX", b"Phase One", b"Leaf"),
    *(b"Hasselblad", b"SAMSUNG", b"KODAK", b"LEICA", b"RICOH", b"SIGMA", b"Apple", b"Minolta", b"GoPro", b"SONY"),
)
COMPRESSIONS = (0, 1, 2, 6, 7, 8, 99, 32767, 32769, 32770, 32803, 34316, 34713, 34892, 52546, 65000, 65535)
MAGICS = (
    *(b"FUJIFILMCCD-RAW ", b"IIU\0", b"IIRO\x08\0\0\0", b"MMMM", b"\0MRM", b"FOVb", b"RIFF", b"BOKE", b"ARRI"),
    *(b"\0\0\0\x18ftypcrx ", b"II\x1a\0\0\0HEAPCCDR", b"NOKIARAW", b"XPDS", b"DSC-Image", b"qktk", b"STI"),
)


@dataclass(frozen=True)
class Entry:
    """A TIFF tag: the offset of its 12 bytes, and their fields."""

    at: int
    tag: int
    kind: int
    count: int
    value: int


def entries(data: bytes) -> list[Entry]:
    """All tags of a little-endian TIFF file, including sub-directories (SubIFD 330, EXIF 34665)."""
    found, waiting, seen = [], [struct.unpack_from("<I", data, 4)[0]], set()
    while waiting:
        start = waiting.pop()
        if start in seen or start + 2 > len(data):
            continue
        seen.add(start)
        (number,) = struct.unpack_from("<H", data, start)
        for at in range(start + 2, min(start + 2 + 12 * number, len(data) - 12), 12):
            entry = Entry(at, *struct.unpack_from("<HHII", data, at))
            found.append(entry)
            if entry.tag in (330, 34665):
                waiting.append(entry.value)
    return found


def with_field(data: bytes, at: int, form: str, value: int) -> bytes:
    field = struct.pack(form, value)
    return data[:at] + field + data[at + len(field) :]


def mutants(raws: list[bytes], jpgs: list[bytes], seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Endless (names of the changes, "raw" or "jpg", the file's bytes)."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(("raw", "raw", "jpg"))
        data = rng.choice(raws if kind == "raw" else jpgs)
        actions = (*_ANY, *(_TIFF if kind == "raw" else _JPG))
        names = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            action = rng.choice(actions)
            names.append(action.__name__.strip("_"))
            if data:
                data = action(data, rng)
        yield "+".join(names), kind, data


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 40, 1000))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_header_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 10))):
        changed[rng.randrange(min(len(changed), 1200))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 2000)), len(data) - 1))]


def _empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def _zero_block(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice((16, 512, 4096, 65536)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def _drop_block(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 512, 4096)) :]


def _repeat_block(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + rng.choice((1, 512, 4096))] * 2 + data[start:]


def _other_magic(data: bytes, rng: random.Random) -> bytes:
    magic = rng.choice(MAGICS)
    return magic + data[len(magic) :]


def _swap_order(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"MM\0*", b"MM*\0", b"II\0*")) + data[4:]


def _change(data: bytes, rng: random.Random, tags: tuple[int, ...], values: tuple[int, ...]) -> bytes:
    """Change the value of one of these tags, in any directory."""
    chosen = [entry for entry in _entries(data) if entry.tag in tags]
    if not chosen:
        return data
    entry = rng.choice(chosen)
    return with_field(data, entry.at + 8, "<I", rng.choice(values) & 0xFFFFFFFF)


def _entries(data: bytes) -> list[Entry]:
    return entries(data) if data[:4] == b"II*\0" and len(data) > 8 else []


def _huge_dimensions(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, DIMENSIONS, (0, 1, 31, 4096, 30_000, 65_535, 100_000, 1 << 20, (1 << 31) - 1, 1 << 31))


def _wrong_offset(data: bytes, rng: random.Random) -> bytes:
    inside = tuple(rng.randrange(len(data)) for _ in range(4))
    return _change(data, rng, OFFSETS, (0, 8, len(data) - 1, len(data), (1 << 32) - 1, *inside))


def _wrong_count(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, COUNTS, EDGES)


def _any_value(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, tuple(entry.tag for entry in _entries(data)), (*EDGES, rng.randrange(1 << 32)))


def _tag_count(data: bytes, rng: random.Random) -> bytes:
    chosen = _entries(data)
    return with_field(data, rng.choice(chosen).at + 4, "<I", rng.choice(EDGES)) if chosen else data


def _tag_type(data: bytes, rng: random.Random) -> bytes:
    chosen = _entries(data)
    return with_field(data, rng.choice(chosen).at + 2, "<H", rng.randrange(20)) if chosen else data


def _tag_name(data: bytes, rng: random.Random) -> bytes:
    chosen = _entries(data)
    other = rng.choice((258, 259, 262, 324, 325, 529, 700, 33421, 33422, 34675, 50714, 50717, 50829, 51008, 0x7310))
    return with_field(data, rng.choice(chosen).at, "<H", other) if chosen else data


def _compression(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, (259,), COMPRESSIONS)


def _bits(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, (258,), (1, 4, 7, 8, 10, 12, 15, 17, 24, 32, 64))


def _photometric(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, (262,), (0, 1, 2, 6, 32803, 34892, 51177))


def directory_loop(data: bytes, rng: random.Random) -> bytes:
    return _change(data, rng, (330, 34665), (8, 10, *(entry.at - 2 for entry in _entries(data))))


def _other_maker(data: bytes, rng: random.Random) -> bytes:
    for entry in _entries(data):
        if entry.tag == 271 and entry.value + 20 < len(data):
            name = rng.choice(MAKERS)
            data = data[: entry.value] + name + b"\0" + data[entry.value + len(name) + 1 :]
            data = with_field(data, entry.at + 4, "<I", len(name) + 1)
    return _compression(data, rng) if rng.random() < 0.5 else data


def segments(data: bytes) -> list[int]:
    """Offsets of a JPG's segments."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        found.append(at)
        if data[at + 1] == 0xDA:
            break
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return found


def _jpg_dimensions(data: bytes, rng: random.Random) -> bytes:
    for at in segments(data):
        if data[at + 1] in (0xC0, 0xC1, 0xC2):
            side = rng.choice((5, 7))
            data = with_field(data, at + side, ">H", rng.choice((0, 1, 8, 4096, 30_000, 65_500, 65_535)))
    return data


def _jpg_segment_length(data: bytes, rng: random.Random) -> bytes:
    return with_field(data, rng.choice(segments(data) or [2]) + 2, ">H", rng.choice((0, 1, 2, 3, 64, 65_535)))


def _jpg_marker(data: bytes, rng: random.Random) -> bytes:
    return with_field(data, rng.choice(segments(data) or [2]) + 1, ">B", rng.randrange(256))


def _jpg_table_byte(data: bytes, rng: random.Random) -> bytes:
    start = rng.choice(segments(data) or [2])
    return with_field(data, min(start + rng.randrange(2, 40), len(data) - 1), ">B", rng.randrange(256))


_Action = Callable[[bytes, random.Random], bytes]
_ANY: tuple[_Action, ...] = (
    *(_flip_bits, _flip_header_bits, _truncate, _zero_block, _drop_block, _repeat_block, _other_magic, _empty),
)
_TIFF: tuple[_Action, ...] = (
    *(_swap_order, _huge_dimensions, _huge_dimensions, _wrong_offset, _wrong_offset, _wrong_count, _any_value),
    *(_any_value, _tag_count, _tag_type, _tag_name, _compression, _bits, _photometric, directory_loop, _other_maker),
)
_JPG: tuple[_Action, ...] = (
    *(_jpg_dimensions, _jpg_dimensions, _jpg_segment_length, _jpg_marker, _jpg_table_byte, _jpg_table_byte),
)
