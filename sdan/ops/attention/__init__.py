"""Cross packing attention (CPA) and the packed attention inside it."""

from sdan.ops.attention.cross_packing import cross_packing
from sdan.ops.attention.packed import packed_attention

__all__ = ["cross_packing", "packed_attention"]
