"""SDAN, the Squared Deformable Alignment Network: the paper's figures 1 and 2.

Axes: N batch, C features, (H, W) the size of the input x. The mosaic has size (H, W) for mosaic and RGB input and
(2H, 2W) for packed input. The zoomed output is `scale` times as large as the mosaic.

    x ---------> head ---> F^X ----------------------------+
                            |                              |
    reference -> flips -> conv -> F^Y' -> concat -> offset learner -> Theta      figure 2
                                                           |
                              F^X' = ReLU(SDCN(F^X | Theta)) -> conv -> X'
                                           |
                     16 residual blocks -> pixel shuffle -> conv -> zoomed       figure 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.attention import ChannelAttention, CrossPackingAttention, check_packing
from sdan.offsets.offset_learner import PyramidOffsetLearner
from sdan.ops import offset_mask, per_point_deform_conv2d, squared_deform_conv2d
from sdan.ops.narrow_conv import narrow_conv2d
from sdan.ops.upsampling import conv_shuffle
from sdan.resample import bicubic, blur, enlarge_offset, low_pass, sample

Input = Literal["mosaic", "packed", "rgb", "packed_rgb"]
Offset = Literal["squared", "per_point"]
Learner = Literal["paper", "pyramid"]
Attention = Literal["none", "channel", "cross_packing"]
Skip = Literal["none", "rendering"]
Tones = Literal["free", "kept"]
Upsampling = Literal["stages", "direct"]
Encoding = Literal["linear", "sqrt"]
RenderingCurve = Literal["srgb", "bt709"]
CHANNELS = {"mosaic": 1, "packed": 4, "rgb": 3, "packed_rgb": 12}
"""Channels of the input x."""
TONE_SIGMA_PX = 4.0
"""Standard deviation, in mosaic pixels, of the Gaussian that separates tones from detail for tones="kept". It reaches
12 pixels, half of zoom's overlap."""

_CHOICES = {
    "input": Input,
    "encoding": Encoding,
    "rendering_curve": RenderingCurve,
    "offset": Offset,
    "offset_learner": Learner,
    "attention": Attention,
    "skip": Skip,
    "tones": Tones,
    "upsampling": Upsampling,
}
_MOST = {"features": 1024, "blocks": 256, "packing_kernel": 256, "max_shift_px": 1024}
"""Bounds well above every known network, so that a wrong number is refused before layers are built."""


@dataclass(frozen=True)
class SDANConfig:
    """Architecture of SDAN and SRResNet; the values are checked when constructed (ValueError).

    The rows of Table 2 are different values of this class.
    """

    input: Input = "mosaic"
    """mosaic: [N,1,H,W], as released. packed: RGGB [N,4,H,W] at half the mosaic's size (the trunk is 4x cheaper).
    rgb: [N,3,H,W]. packed_rgb: RGB in cells of 2x2 pixels [N,12,H,W] at half the picture's size (ours)."""
    encoding: Encoding = "linear"
    """Encoding of RAW values for the head. linear: the paper's. sqrt: their square root, which makes photon noise equal
    in shadows and highlights and is closer to the output's sRGB (ours)."""
    rendering_curve: RenderingCurve = "srgb"
    """Curve of the renderings that the network was trained with. srgb: sRGB's. bt709: LibRaw's default, for models made
    before version 0.3. An rgb input has no rendering; its pictures are sRGB."""
    scale: int = 4
    """Size of the output over size of the mosaic: 2, 4, 8 or 16."""
    features: int = 64
    """Channels of the feature maps."""
    blocks: int = 16
    """Residual blocks of the trunk."""
    packing_kernel: int = 8
    """K of cross packing attention; must divide the input's height and width."""
    offset: Offset = "squared"
    """squared: one offset for the whole window (SDCN). per_point: one per window tap (vanilla DCN)."""
    offset_learner: Learner = "paper"
    """paper: figure 2's. pyramid: similarities of x and the reference, coarse to fine (sdan/offsets/; ours).
    The attention, the packing kernel and the flips are parts of the paper's only."""
    max_shift_px: int = 24
    """Largest shift that the pyramid looks for, mosaic pixels."""
    attention: Attention = "cross_packing"
    """Attention of the offset learner. none; channel: squeeze-and-excitation; cross_packing: CPA."""
    flips: bool = True
    """Whether the offset learner also sees the reference's three flips."""
    skip: Skip = "none"
    """rendering: the input's rendering, moved by the learnt offset and enlarged, is added to the output (ours)."""
    tones: Tones = "free"
    """kept: the trunk's output is added to the skip without its low frequencies, so that flat areas keep the tones and
    colours of the rendering whatever the network has learnt (ours). free: as it is. kept requires skip="rendering"."""
    upsampling: Upsampling = "stages"
    """stages: pixel shuffle by 2 per stage, all features kept (the paper's). direct: one convolution and one pixel
    shuffle (as ESPCN), a tenth of the cost from packed RAW (ours, for small models)."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.encoding != "linear" and self.is_rgb:
            raise ValueError(f"encoding: expected linear for rgb input, which is already sRGB, got {self.encoding!r}")
        if self.tones == "kept" and self.skip != "rendering":
            raise ValueError(f'tones: expected free without skip="rendering", got {self.tones!r}')
        if self.offset_learner == "pyramid" and self.offset != "squared":
            raise ValueError(f'offset: expected squared with offset_learner="pyramid", got {self.offset!r}')
        for name, most in _MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")
        if type(self.flips) is not bool:
            raise ValueError(f"flips: expected true or false, got {self.flips!r}")
        if type(self.scale) is not int or self.scale not in (2, 4, 8, 16):
            raise ValueError(f"scale: expected one of 2, 4, 8, 16 (each pixel shuffle doubles), got {self.scale!r}")

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> SDANConfig:
        """The config of a checkpoint or run; values that its version did not store get that version's behaviour.

        Raises:
            ValueError: unknown names, or values out of range.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            names = sorted(unknown)
            raise ValueError(f"SDANConfig: expected known values, got {names}; use the newer SDAN that wrote it")
        return cls(**{"rendering_curve": "bt709", **values})

    @property
    def is_rgb(self) -> bool:
        """Whether x is an sRGB picture instead of RAW."""
        return self.input in ("rgb", "packed_rgb")

    @property
    def is_packed(self) -> bool:
        """Whether x holds cells of 2x2 pixels."""
        return self.input in ("packed", "packed_rgb")

    @property
    def upscale(self) -> int:
        """Side of the zoomed output over side of the input x: twice the scale for packed input."""
        return self.scale * self.mosaic_factor

    @property
    def mosaic_factor(self) -> int:
        """Side of the mosaic (and of the rendering) over side of the input x."""
        return 2 if self.is_packed else 1

    @property
    def needs_fixed_tile(self) -> bool:
        """Whether the offsets depend on the tile's size, so that zoom's tiles must have the training crops' size."""
        return self.offset_learner == "paper" and self.attention == "cross_packing"

    def input_px(self, packed_px: int) -> int:
        """Convert a side in packed pixels (2x2 cells) to pixels of the input x."""
        return packed_px if self.is_packed else 2 * packed_px

    def check_crop(self, crop_px: int) -> None:
        """Raise ValueError unless the network accepts crops of crop_px x crop_px input pixels."""
        if self.input == "mosaic" and crop_px % 2:
            raise ValueError(f"mosaic crop: expected an even side, for whole RGGB cells, got {crop_px}")
        if self.needs_fixed_tile:
            check_packing(self.packing_kernel, crop_px, crop_px)


class SDANOutput(NamedTuple):
    """Output of forward; (H, W) is the size of x."""

    zoomed: Tensor
    """[N, 3, upscale H, upscale W], sRGB, not clipped to [0, 1]."""
    aligned: Tensor
    """X' [N, 3, H, W], sRGB: the input moved to the reference's view."""
    mask: Tensor
    """M [N, 1, H, W], 1 where p + offset(p) is inside the image, else 0; no gradient."""
    offset: Tensor
    """Theta [N, 2, H, W] = (dy, dx), pixels of x: X'(p) comes from x(p + offset(p)). For per_point offsets this is the
    offset of the window's centre."""


class OffsetLearner(nn.Module):
    """f_offset (figure 2, top): conv, attention, ReLU, conv, attention, ReLU, conv -> offsets in pixels (float32)."""

    def __init__(self, config: SDANConfig, offset_channels: int) -> None:
        super().__init__()
        c, self.offset_channels = config.features, offset_channels
        self.conv1, self.attention1 = nn.Conv2d(2 * c, c, 3, padding=1), _attention(config)
        self.conv2, self.attention2 = nn.Conv2d(c, c, 3, padding=1), _attention(config)
        self.conv3 = nn.Conv2d(c, offset_channels, 3, padding=1)
        for conv in (self.conv1, self.conv2, self.conv3):  # initialised as in the released code
            nn.init.kaiming_normal_(conv.weight, a=0.02)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        if config.skip == "rendering":
            nn.init.zeros_(self.conv3.weight)

    def forward(self, features_N2CHW: Tensor) -> Tensor:
        hidden = _attend_relu(self.attention1, self.conv1(features_N2CHW))
        hidden = _attend_relu(self.attention2, self.conv2(hidden))
        return narrow_conv2d(hidden, self.conv3.weight, self.conv3.bias)


class AlignmentModule(nn.Module):
    """The squared deformable alignment module, figure 2."""

    def __init__(self, config: SDANConfig) -> None:
        super().__init__()
        c, self.kernel = config.features, 3
        self.flips, self.per_point = config.flips, config.offset == "per_point"
        self.offset_learner: OffsetLearner | PyramidOffsetLearner
        if config.offset_learner == "pyramid":
            self.offset_learner = PyramidOffsetLearner(config.input, -(-config.max_shift_px // config.mosaic_factor))
        else:
            self.reference_conv = nn.Conv2d(12 if config.flips else 3, c, 3, padding=1)
            self.offset_learner = OffsetLearner(config, 2 * self.kernel**2 if self.per_point else 2)
        self.deform = nn.Conv2d(c, c, self.kernel, padding=1)  # holds SDCN's weight and bias
        self.to_rgb = nn.Conv2d(c, 3, 3, padding=1)

    def forward(
        self, features_NCHW: Tensor, reference_N3HW: Tensor, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(F^X, Y', x) -> (F^X', X', M, Theta), in the paper's symbols. Only the pyramid needs x."""
        offset = self.find_offset(features_NCHW, reference_N3HW, x)
        aligned_features = self.move(features_NCHW, offset)
        centre = self.centre(offset)
        return aligned_features, self.to_rgb(aligned_features), offset_mask(centre.detach()), centre

    def find_offset(self, features_NCHW: Tensor, reference_N3HW: Tensor, x: Tensor | None = None) -> Tensor:
        """(F^X, Y', x) -> the offsets of the window, [N, 2, H, W]; per_point: those of its taps, [N, 2 K^2, H, W]."""
        if isinstance(self.offset_learner, PyramidOffsetLearner):
            assert x is not None
            pyramid: Tensor = self.offset_learner(x, reference_N3HW)
            return pyramid
        views = with_flips(reference_N3HW) if self.flips else reference_N3HW
        reference_features = F.relu(self.reference_conv(views))
        return self.offset_learner(torch.cat((features_NCHW, reference_features), dim=1))

    def move(self, features_NCHW: Tensor, offset: Tensor) -> Tensor:
        """(F^X, the offsets of `find_offset`, or none: zero) -> F^X'."""
        if offset.shape[1] == 0:
            padding = self.kernel // 2
            return F.relu(F.conv2d(features_NCHW, self.deform.weight, self.deform.bias, padding=padding))
        deform = per_point_deform_conv2d if self.per_point else squared_deform_conv2d
        return F.relu(deform(features_NCHW, offset, self.deform.weight, self.deform.bias))

    def centre(self, offset: Tensor) -> Tensor:
        """Theta [N, 2, H, W]: the offset of the window's centre; without offsets [N, 0, H, W]."""
        centre = self.kernel**2 // 2
        return offset[:, 2 * centre : 2 * centre + 2] if self.per_point else offset


class ResidualBlock(nn.Module):
    """SRResNet's block without normalisation: x + conv(ReLU(conv(x))); no biases, as released."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class SuperResolution(nn.Module):
    """The trunk (figure 1, right): residual blocks with a global skip, pixel-shuffle upsampling, conv -> RGB.

    With upsampling="direct" the last convolution also upsamples.
    """

    def __init__(self, config: SDANConfig) -> None:
        super().__init__()
        c, stages = config.features, config.upscale.bit_length() - 1
        self.shuffle = config.upscale if config.upsampling == "direct" else 1
        self.blocks = nn.Sequential(*(ResidualBlock(c) for _ in range(config.blocks)))
        self.join = nn.Conv2d(c, c, 3, padding=1, bias=False)
        enlarging = stages if config.upsampling == "stages" else 0
        self.enlarge = nn.ModuleList(nn.Conv2d(c, 4 * c, 3, padding=1) for _ in range(enlarging))
        self.last = nn.Conv2d(c, 3 * self.shuffle**2, 3, padding=1)
        # skip="rendering" starts with a zero last convolution. After a ReLU all its inputs would be positive, and
        # Adam's first steps would add up to a large change of the mean. So this form has no activation, as in EDSR.
        self.relu = config.skip != "rendering"
        if config.skip == "rendering":
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, features_NCHW: Tensor) -> Tensor:
        return self.upsample(features_NCHW + self.join(self.blocks(features_NCHW)))

    def upsample(self, x: Tensor) -> Tensor:
        """The part behind the global skip: pixel shuffles and the last convolution."""
        for conv in self.enlarge:
            assert isinstance(conv, nn.Conv2d)
            x = conv_shuffle(x, conv.weight, conv.bias, 2, relu=self.relu)
            # torch 2.14's Inductor cannot sort the symbolic strides of a view that it saves for the backward pass.
            if torch.compiler.is_dynamo_compiling():
                x = x.contiguous(memory_format=torch.channels_last)
        return self.last(x) if self.shuffle == 1 else F.pixel_shuffle(self.last(x), self.shuffle)


class SDAN(nn.Module):
    """The whole network, figure 1."""

    input_tile_px: int | None = None
    """Side of the training crops, pixels of x: the tile size for zooming. Set by checkpoint.load."""

    def __init__(self, config: SDANConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Conv2d(CHANNELS[config.input], config.features, 3, padding=1)
        self.alignment = AlignmentModule(config)
        self.super_resolution = SuperResolution(config)

    def forward(self, x: Tensor, reference: Tensor, rendering: Tensor | None = None) -> SDANOutput:
        """Zoom x into the view of the reference.

        Args:
            x: RAW in [0, 1], white-balanced: [N,1,H,W] (mosaic) or [N,4,H,W] (packed); or sRGB in [0, 1]: [N,3,H,W]
                (rgb) or [N,12,H,W] (packed_rgb).
            reference: [N,3,H,W] sRGB in [0, 1]. Y' in training; the rendering at x's size ({X, X}) when deployed.
            rendering: [N,3,H,W] ([N,3,2H,2W] for packed input) sRGB in [0, 1]; required for skip="rendering",
                else unused.

        Returns:
            SDANOutput(zoomed, aligned, mask, offset).

        Raises:
            ValueError: shapes that do not match each other or the config.
        """
        check_inputs(self.config, x, reference, rendering)
        aligned_features, aligned, mask, offset = self.alignment(self._features(x), reference, x)
        return SDANOutput(self._zoomed(aligned_features, offset, rendering), as_picture(aligned), mask, offset)

    def offset_to(self, x: Tensor, reference: Tensor) -> Tensor:
        """Theta [N,2,H,W] of `forward` alone, to any reference."""
        return self.alignment.centre(self.alignment.find_offset(self._features(x), reference, x))

    def find_offset(self, x: Tensor, reference: Tensor) -> Tensor:
        """The offsets of the deployed pass {X, X}; they depend on the input's size, through attention and flips.

        The pyramid's are not computed: a picture has no offset to itself, so there are no channels.

        Returns:
            the offsets for `zoom_at`, [N, offset_channels, H, W].
        """
        if not self.offset_channels:
            return x.new_empty((x.shape[0], 0, *x.shape[2:]))
        return self.alignment.find_offset(self._features(x), reference, x)

    def zoom_at(self, x: Tensor, offset: Tensor, rendering: Tensor | None = None) -> Tensor:
        """The rest of `forward`: `zoomed`, with these offsets (zero if the tensor has no channels).

        A pixel depends on its neighbourhood in x only.
        """
        aligned_features = self.alignment.move(self._features(x), offset)
        return self._zoomed(aligned_features, self.alignment.centre(offset), rendering)

    @property
    def offset_channels(self) -> int:
        """Channels of `find_offset`; 0 if the deployed pass needs no offsets."""
        learner = self.alignment.offset_learner
        return learner.offset_channels if isinstance(learner, OffsetLearner) else 0

    def _features(self, x: Tensor) -> Tensor:
        return F.relu(self.head(x.clamp_min(0).sqrt() if self.config.encoding == "sqrt" else x))

    def _zoomed(self, aligned_features: Tensor, offset: Tensor, rendering: Tensor | None) -> Tensor:
        zoomed = as_picture(self.super_resolution(aligned_features))
        if self.config.skip == "rendering":
            assert rendering is not None
            zoomed = add_skip(zoomed, rendering, offset, self.config)
        return zoomed


def as_picture(image: Tensor) -> Tensor:
    """The image in float32; on a GPU contiguous, as the pictures are that it is added to and compared with."""
    return image.to(torch.float32, memory_format=torch.contiguous_format) if image.is_cuda else image.float()


def with_flips(image_NCHW: Tensor) -> Tensor:
    """Stack the image and its flips: top to bottom, left to right, both; [N, 4C, H, W] (paper, section 3.2)."""
    flips = (image_NCHW.flip(2), image_NCHW.flip(3), image_NCHW.flip(2, 3))
    return torch.cat((image_NCHW, *flips), dim=1)


def add_skip(detail: Tensor, rendering: Tensor, offset: Tensor, config: SDANConfig) -> Tensor:
    """detail + the skip: the rendering sampled at p + offset(p), then enlarged bicubically by the scale; float32.

    Args:
        detail: the trunk's output [N,3,upscale H,upscale W]; without its low frequencies for tones="kept".
        rendering: [N,3,mosaic H,mosaic W].
        offset: [N,2,H,W] in pixels of x; enlarged to the rendering's grid first. [N,0,H,W]: zero.
    """
    moved = rendering.float()
    if offset.shape[1]:
        moved = sample(moved, enlarge_offset(offset.float(), config.mosaic_factor))
    if config.tones == "kept":
        moved = moved - blur(low_pass(detail, config.scale), TONE_SIGMA_PX)
    return detail + bicubic(moved, config.scale)


def check_inputs(config: SDANConfig, x: Tensor, reference: Tensor, rendering: Tensor | None) -> None:
    """Raise ValueError unless the inputs' shapes match the config and each other."""
    n, channels, height, width = x.shape if x.dim() == 4 else (0, 0, 0, 0)
    if x.dim() != 4 or channels != CHANNELS[config.input]:
        raise ValueError(
            f"x: expected [N,{CHANNELS[config.input]},H,W] for input={config.input!r}, got {tuple(x.shape)}"
        )
    if reference.shape != (n, 3, height, width):
        raise ValueError(f"reference: expected {(n, 3, height, width)}, x's size, got {tuple(reference.shape)}")
    if config.skip == "rendering":
        expected = (n, 3, height * config.mosaic_factor, width * config.mosaic_factor)
        got = None if rendering is None else tuple(rendering.shape)
        if got != expected:
            raise ValueError(f'rendering: expected {expected} for skip="rendering", got {got}')


def _attention(config: SDANConfig) -> nn.Module:
    if config.attention == "cross_packing":
        return CrossPackingAttention(config.packing_kernel)
    return ChannelAttention(config.features) if config.attention == "channel" else nn.Identity()


def _attend_relu(attention: nn.Module, x_NCHW: Tensor) -> Tensor:
    """ReLU(attention(x))."""
    if isinstance(attention, CrossPackingAttention):
        attended: Tensor = attention(x_NCHW, relu=True)
        return attended
    return F.relu(attention(x_NCHW))
