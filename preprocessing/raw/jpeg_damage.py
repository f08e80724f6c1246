"""Damage inside the compressed data of a JPG, which decoders pass over: they go on with shifted or grey blocks.

Pillow and OpenCV hide libjpeg's warnings, and simplejpeg reports them. A JPG has no checksum, so damage that leaves
decodable data of the right length is not found: a single wrong bit mostly is such damage, 4 KB of zeros hardly ever.
"""

import re

_COMPLAINT = "Corrupt JPEG data: "
_EXTRANEOUS_AT_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_SLOP_BYTES = 16
"""Bytes left over behind the last block that some cameras write in whole pictures."""
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


def jpeg_damage(data: bytes) -> str | None:
    """What libjpeg complains about in a JPG's compressed data, e.g. "bad Huffman code".

    None if it is intact, or if it cannot be checked (CMYK, and files that libjpeg refuses: other decoders say why). All
    data are decoded, but at an eighth of the size.
    """
    import simplejpeg  # here, so that other pictures can be read without it

    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        text = str(error)
        if text.startswith(_COMPLAINT) and not _is_padding(data, text):
            return text.removeprefix(_COMPLAINT)
    return None


def _is_padding(data: bytes, complaint: str) -> bool:
    """Whether the complaint is about bytes behind the last block that hold nothing."""
    left_over = _EXTRANEOUS_AT_END.search(complaint)
    if left_over is None:
        return False
    count = int(left_over[1])
    end = data.find(_END_OF_IMAGE, _first_scan(data))
    return count <= _SLOP_BYTES or len(set(data[max(end - count, 0) : end])) == 1


def _first_scan(data: bytes) -> int:
    """Where the compressed data begin; segments before it may hold a whole JPG as a preview."""
    at = 2
    while at + 4 <= len(data) and data[at : at + 2] != _START_OF_SCAN:
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    return at
