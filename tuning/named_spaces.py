"""The search spaces that `sdan tune --space NAME` knows, with the reason for each range.

The names are dotted config names (`sdan train --set NAME=VALUE`), which the train function checks.
"""

from collections.abc import Callable

from tuning.space import Distribution, choice, loguniform, uniform

DEFAULT = "default"


def default() -> dict[str, Distribution]:
    """What the paper leaves open, and what decides how well a network learns in a given time.

    model.packing_kernel: 2, 4, 8, 16. The paper prints 8. K sets the size of a token of cross packing attention (K^2
        groups of H W / K^2 positions): its cost and reach change with it, and the paper does not say how much. K must
        divide the crop; trials with others are not started.
    loss.align_weight: 0.03 to 3. The weight of X' in eq. 6, 1 in the paper. Logarithmic: its ratio to 1 matters.
        Towards 0 nothing guides the offsets; above 3 the small picture outweighs the zoomed one.
    loss.self_reference_weight: 0 to 2. Weight of the samples whose reference is the input itself, as in use. 0 was best
        for registered pairs in a small sweep (benchmarks/RESULTS.md, Self-reference samples); others may need more.
    loss.border_px: 0 to 32, the default. The frame of the output that the loss leaves out, because convolutions see
        zeros beyond it: 0 scores it, 32 uses less of each crop.
    train.learning_rate: 1e-4 to 2e-3. The paper's 1e-4 is for 300 epochs; our short configs have 1e-3. Trials below
        train.learning_rate_floor are not started.
    """
    return {
        "model.packing_kernel": choice([2, 4, 8, 16]),
        "loss.align_weight": loguniform(0.03, 3.0),
        "loss.self_reference_weight": choice([0.0, 0.25, 0.5, 1.0, 2.0]),
        "loss.border_px": choice([0, 8, 16, 32]),
        "train.learning_rate": loguniform(1e-4, 2e-3),
    }


def paper() -> dict[str, Distribution]:
    """The paper's two open questions alone, for few trials: CPA's packing kernel and the weight of X' in eq. 6.

    Ranges as in `default`.
    """
    space = default()
    return {name: space[name] for name in ("model.packing_kernel", "loss.align_weight")}


def size() -> dict[str, Distribution]:
    """The network's size: what quality costs. Use it with `--metric val_psnr --metric ms_per_megapixel`.

    model.features: 16 to 96 around the paper's 64; a convolution's cost grows with its square.
    model.blocks: 2 to 24 around the paper's 16; cost grows in proportion.
    model.packing_kernel: 4, 8, 16: the attention's share of the cost differs between small and large networks.
    train.learning_rate: 2e-4 to 2e-3: the best rate depends on the size, and a size must not lose by its rate.
    """
    return {
        "model.features": choice([16, 24, 32, 48, 64, 96]),
        "model.blocks": choice([2, 4, 8, 12, 16, 24]),
        "model.packing_kernel": choice([4, 8, 16]),
        "train.learning_rate": loguniform(2e-4, 2e-3),
    }


def offsets() -> dict[str, Distribution]:
    """The offset learner, for pairs that are not registered (`sdan preprocess --align scale`).

    model.attention: none, channel, cross_packing: the three learners of the paper's Table 2.
    model.packing_kernel: 2, 4, 8, 16, as in `default`; it has no effect without cross packing attention.
    loss.align_weight: 0.1 to 10. The only term that sees X' directly, so larger values than in `default`.
    loss.self_reference_weight: 0 to 1. On {X, X} the right offset is 0: a large weight may keep the offsets there.
    train.learning_rate: 1e-4 to 1e-3. Large steps are a risk where the gradient of a bilinear sample reaches one pixel.
    """
    return {
        "model.attention": choice(["none", "channel", "cross_packing"]),
        "model.packing_kernel": choice([2, 4, 8, 16]),
        "loss.align_weight": loguniform(0.1, 10.0),
        "loss.self_reference_weight": uniform(0.0, 1.0),
        "train.learning_rate": loguniform(1e-4, 1e-3),
    }


SPACES: dict[str, Callable[[], dict[str, Distribution]]] = {
    function.__name__: function for function in (default, paper, size, offsets)
}
