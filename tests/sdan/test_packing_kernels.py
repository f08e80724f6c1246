"""The packing kernels equal plain PyTorch, in Triton's interpreter and on a GPU if present, and compile for many GPUs.

As in `test_triton_kernels.py`, the tests marked `interpreted` run in a separate process, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import INTERPRETING, interpreted, run_under_the_interpreter

from sdan.ops import portable_form
from sdan.ops.attention import cross_packing, packed, packing
from sdan.ops.attention.packing import Packing

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# N, C, H, W, K: all kernels of the configs, odd numbers of windows, several tiles in both directions, single values
SHAPES = [(2, 3, 4, 6, 2), (1, 2, 12, 4, 4), (1, 2, 8, 8, 8), (1, 5, 3, 9, 3), (1, 2, 5, 27, 1), (1, 70, 1, 3, 1)]
CASES = [(shape, torch.float64, layout) for shape in SHAPES for layout in (True, False)]
CASES += [(SHAPES[0], dtype, True) for dtype in (torch.float32, torch.float16, torch.bfloat16)]


def images(shape, dtype, channels_last, number=3, device="cpu"):
    """Seeded images [N, C, H, W] in one of the two layouts."""
    random = torch.Generator().manual_seed(4)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = [torch.randn(shape[:4], generator=random, dtype=torch.float64).to(dtype) for _ in range(number)]
    return [image.to(device).contiguous(memory_format=layout) for image in made]


def packed_by_hand(image, kernel, channels_last):
    """The tokens, in the order that `sdan.ops.attention.packing` describes."""
    num_images, channels, height, width = image.shape
    windows = image.reshape(num_images, channels, height // kernel, kernel, width // kernel, kernel)
    order = (0, 3, 5, 1, 2, 4) if channels_last else (0, 3, 1, 5, 2, 4)
    return windows.permute(order).reshape(num_images, channels * kernel**2, -1)


def assert_near(got, expected, limit):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert float((got.double() - expected.double()).abs().max()) <= limit * max(float(expected.double().abs().max()), 1)


def compare(kernels, shape, dtype, channels_last, device="cpu"):
    """Compare every function and option of `kernels` with `packing` on the CPU."""
    how, limit = Packing(shape[4], channels_last), LIMITS[dtype]
    x, grad, out = images(shape, dtype, channels_last)
    on = [image.to(device) for image in (x, grad, out)]
    gamma = torch.full((1,), 0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, negated = kernels.pack(on[0], how)
    assert torch.equal(tokens.cpu(), packed_by_hand(x, *how))
    assert torch.equal(negated, -tokens)
    attended = packing.pack(grad, how)[0]
    grads = tuple(packing.pack(image, how)[0] for image in images(shape, dtype, channels_last, number=3))
    for relu, given in ((True, grads), (False, grads[:1])):
        got = kernels.unpack(on[0], attended.to(device), gamma.to(device), how, relu=relu)
        assert got.stride() == x.stride()
        assert_near(got.cpu(), packing.unpack(x, attended, gamma, how, relu=relu), limit)
        relu_out, relu_out_on = (out, on[2]) if relu else (None, None)
        rest = tokens, attended.to(device), gamma.to(device), how
        grad_tokens, negated, parts = kernels.pack_gradient(on[1], relu_out_on, *rest)
        expected = packing.pack_gradient(grad, relu_out, tokens.cpu(), attended, gamma, how)
        assert_near(grad_tokens.cpu(), expected[0], limit)
        assert torch.equal(negated, -tokens)
        moved = tuple(tensor.to(device) for tensor in given)
        grad_x, grad_gamma = kernels.unpack_gradient(on[1], relu_out_on, moved, parts, gamma.to(device), how)
        expected_x, expected_gamma = packing.unpack_gradient(grad, relu_out, given, expected[2], gamma, how)
        assert grad_x.stride() == grad.stride()
        assert_near(grad_x.cpu(), expected_x, limit)
        # A sum of up to 524288 products, each rounded; `attended` holds the values of `grad`.
        terms = float(grad.double().square().sum())
        assert abs(float(grad_gamma) - float(expected_gamma)) <= limit * max(terms, 1)


def block(x, gamma, kernel, relu, upstream):
    """[value, gradient of x, gradient of gamma]."""
    leaves = [x.detach().requires_grad_(), gamma.detach().requires_grad_()]
    value = cross_packing(*leaves, kernel, relu=relu)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_packing_is_the_permutation(shape, channels_last):
    how = Packing(shape[4], channels_last)
    x, attended_image, _ = images(shape, torch.float64, channels_last)
    tokens, _ = packing.pack(x, how)
    assert torch.equal(tokens, packed_by_hand(x, *how))
    assert tokens.shape == how.token_shape(x.shape)
    out = packing.unpack(x, packing.pack(attended_image, how)[0], torch.tensor([0.5]), how, relu=False)
    assert_near(out, x + 0.5 * attended_image, 1e-12)


def test_under_the_interpreter():
    run_under_the_interpreter(__file__, len(CASES) + 5)


@interpreted
@pytest.mark.parametrize(("shape", "dtype", "channels_last"), CASES)
def test_interpreter_equals_plain_pytorch(shape, dtype, channels_last):
    from sdan.ops.attention import triton_packing

    compare(triton_packing, shape, dtype, channels_last)


def separate_attend(tokens, negated=None):
    """As `packed.attend` with a fused kernel: the queries are the negated tokens."""
    output = torch.softmax(negated @ tokens.mT, dim=-1) @ tokens
    return output, tokens.new_zeros(tokens.shape[:2])


def separate_attend_backward(grad, tokens, negated, output, log_sum):
    """(dV, dK, dQ), as `packed.attend_backward` with a fused kernel."""
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (negated, tokens, tokens))
        attended = torch.softmax(query @ key.mT, dim=-1) @ value
    assert_near(output, attended.detach(), 1e-12)
    return tuple(part.contiguous() for part in torch.autograd.grad(attended, (value, key, query), grad))


@interpreted
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_interpreter_runs_the_whole_block(channels_last, relu, monkeypatch):
    """Pack, attend, unpack and their gradients, with an attention in place of the fused kernel."""
    monkeypatch.setattr(packed, "attend", separate_attend)
    monkeypatch.setattr(packed, "attend_backward", separate_attend_backward)
    x, upstream = images((2, 3, 4, 6), torch.float64, channels_last, number=2)
    gamma = torch.tensor([0.7], dtype=torch.float64)
    got = block(x, gamma, 2, relu, upstream)
    with portable_form():
        expected = block(x, gamma, 2, relu, upstream)
    assert got[0].stride() == got[1].stride() == x.stride()
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, 1e-12)


@interpreted
def test_interpreter_copies_other_layouts():
    wide = images((1, 3, 4, 12), torch.float64, False, number=2)
    x, upstream = (image[..., ::2] for image in wide)
    gamma = torch.tensor([0.7], dtype=torch.float64)
    got = block(x, gamma, 2, True, upstream)
    for a, b in zip(got, block(x.contiguous(), gamma, 2, True, upstream.contiguous()), strict=True):
        assert torch.equal(a, b)


def resources(kernel, dtype, channels_last, architecture):
    """(cuobjdump's resource usage, PTX) of a kernel, compiled as for images 8 x 64 x 128 x 128 and K = 8."""
    import triton
    from compile_report import _NAMES, _resource_usage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdan.ops.attention import triton_packing

    compiled, names = getattr(triton_packing, f"{kernel}_kernel"), {"gamma_ptr": "*fp32", "grad_gamma_ptr": "*fp32"}
    wide = "fp64" if dtype == torch.float64 else "fp32"
    names |= {"parts_ptr": f"*{wide}", "values": "i32", "windows": "i32", "columns": "i32"}
    meta = triton_packing.launch_meta(torch.Size((8, 64, 128, 128)), dtype, Packing(8, channels_last))
    constants = {"RELU": True, "THREE": True, "BLOCK_PARTS": 1024, **meta}
    place = {name: (number,) for number, name in enumerate(compiled.arg_names)}
    signature = {name: "constexpr" if name in constants else names.get(name, f"*{_NAMES[dtype]}") for name in place}
    values = {place[name]: value for name, value in constants.items() if name in place}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in ("values", "windows")]
    attributes = {place[name]: [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(compiled, signature, values, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    return _resource_usage(built.asm["cubin"]), built.asm["ptx"]


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["pack", "unpack", "pack_gradient", "unpack_gradient"])
def test_compiles_without_spills(kernel, architecture):
    pytest.importorskip("triton")
    for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False), (torch.float64, True)):
        usage, ptx = resources(kernel, dtype, channels_last, architecture)
        assert usage["LOCAL"] == usage["STACK"] == 0, usage
        assert usage["REG"] <= 128, usage
        wide, stores = ptx.count("st.global.v4.b32") + ptx.count("st.global.v2.b64"), ptx.count("st.global.")
        assert wide >= stores - 1, (dtype, wide, stores)  # one part or one gradient of gamma is a single value


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 64, 64, 8)])
def test_gpu_equals_plain_pytorch(shape, dtype, channels_last):
    kernels = pytest.importorskip("sdan.ops.attention.triton_packing")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the Triton kernels need sm_80; this GPU uses plain PyTorch")
    compare(kernels, shape, dtype, channels_last, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64, 8), (80, 80, 8), (64, 64, 2)])
def test_gpu_block_equals_the_portable_form(size, dtype, channels_last):
    """Flash and memory-efficient attention, and blocks for the 100 and 1024 values of the other two sizes."""
    height, width, kernel = size
    x = 0.2 * images((2, 16, height, width), torch.float64, channels_last, number=1, device="cuda")[0]
    gamma = torch.tensor([0.7], dtype=torch.float64, device="cuda")
    with portable_form(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = cross_packing(x, gamma, kernel, relu=True)
        upstream = torch.where(value < 0.05, 0, torch.randn_like(x))  # rounding may turn small values into zeros
        expected = block(x, gamma, kernel, True, upstream)
    got = block(x.to(dtype), gamma.float(), kernel, True, upstream.to(dtype))
    assert got[0].stride() == got[1].stride() == x.stride()
    for a, b in zip(got, expected, strict=True):
        assert_near(a.double(), b, 10 * LIMITS[dtype])


@pytest.mark.gpu
@on_gpu
def test_gpu_block_never_stores_the_matrix():
    x = images((8, 64, 128, 128), torch.bfloat16, True, number=1, device="cuda")[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block(x, torch.tensor([0.7], device="cuda"), 8, True, torch.ones_like(x))
    assert torch.cuda.max_memory_allocated() - before < 8 * 4096**2 * 2  # the matrix in bf16; explicit code has six


@pytest.mark.gpu
@on_gpu
def test_gpu_block_runs_in_a_cuda_graph():
    """The launches, prepared or not, follow the current stream."""
    x = images((2, 16, 64, 64), torch.float32, True, number=1, device="cuda")[0].requires_grad_()
    gamma = torch.tensor([0.7], device="cuda", requires_grad=True)
    upstream = torch.ones_like(x)
    run = lambda: torch.autograd.grad(cross_packing(x, gamma, 8, relu=True), (x, gamma), upstream)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [run() for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for tensor in got:
        tensor.zero_()
    graph.replay()
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, 1e-5)
