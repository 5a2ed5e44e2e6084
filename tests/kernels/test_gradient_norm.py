"""gradient_norms against the sum of squares in float64, on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.library import opcheck
from torch.testing._internal.distributed.fake_pg import FakeStore

from vjepa.kernels import _dispatch, backend, gradient_norms

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("gradient_norms", CPU).items() if why.startswith("can run")]
SHAPES = ((3, 5), (1,), (0,), (4, 1, 7), (), (70_001,))
ROUNDING = 2.0**-24  # relative, of one float64 number to float32
NATIVE = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library was not built")


@pytest.fixture(params=BACKENDS)
def _each_backend(request):
    with backend(request.param):
        yield


def draw(dtype=torch.float32, shapes=SHAPES):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def exact(*groups):
    """Python floats; the sum is that of float64, with an error far below one rounding to float32."""
    return [math.sqrt(sum(float(t.double().square().sum()) for t in group if t is not None)) for group in groups]


def assert_rounded_once(norms, truth):
    assert norms.dtype == torch.float32
    assert norms.shape == (len(truth),)
    assert not norms.requires_grad
    for norm, value in zip(norms.tolist(), truth, strict=True):
        assert abs(norm - value) <= value * ROUNDING * (1 + 1e-6)


@pytest.mark.usefixtures("_each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(dtype):
    groups = draw(dtype), draw(dtype, SHAPES[:3]), draw(dtype, SHAPES[-1:])
    before = [t.clone() for group in groups for t in group]
    assert_rounded_once(gradient_norms(groups), exact(*groups))
    assert all(map(torch.equal, (t for group in groups for t in group), before))


@pytest.mark.usefixtures("_each_backend")
def test_dtypes_may_differ_within_a_group():
    group = [*draw(torch.float32), *draw(torch.bfloat16), *draw(torch.float16)]
    assert_rounded_once(gradient_norms([group, group[3:9]]), exact(group, group[3:9]))


def test_float64_is_summed_too():
    groups = draw(torch.float64), [*draw(torch.float64), *draw()]
    assert_rounded_once(gradient_norms(groups), exact(*groups))
    assert gradient_norms([[torch.full((3,), 1e300, dtype=torch.float64)]]).isinf().all()


@pytest.mark.usefixtures("_each_backend")
def test_nothing_counts_as_nothing():
    gradients = draw()
    ours = gradient_norms([[None, *gradients, None], [], [None], [torch.zeros(0)], [torch.zeros(3)]])
    assert_rounded_once(ours, [*exact(gradients), 0, 0, 0, 0])


def test_without_any_gradient():
    for groups, count in (([], 0), ([[]], 1), ([[None], []], 2), ((g for g in ([], [])), 2)):
        norms = gradient_norms(groups)
        assert torch.equal(norms, torch.zeros(count))
        assert norms.device == CPU


def test_gradients_of_modules_as_generators():
    encoder, predictor = nn.Linear(5, 7), nn.Linear(7, 2)
    predictor(encoder(torch.randn(3, 5))).square().sum().backward()
    predictor.bias.grad = None
    ours = gradient_norms((p.grad for p in module.parameters()) for module in (encoder, predictor))
    assert_rounded_once(ours, exact([encoder.weight.grad, encoder.bias.grad], [predictor.weight.grad]))


@pytest.mark.usefixtures("_each_backend")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", [0, 40_000, 70_000])
def test_what_is_not_finite_stays_in_its_group(bad, dtype, where):
    groups = draw(dtype), draw(dtype), draw(dtype)
    groups[1][-1][where] = bad
    norms = gradient_norms(groups)
    assert norms.isfinite().tolist() == [True, False, True]
    assert_rounded_once(norms[::2], exact(*groups[::2]))


@pytest.mark.usefixtures("_each_backend")
def test_squares_beyond_float32():
    """Squares of 1e30 overflow float32 and those of 1e-30 vanish in it; a norm overflows only if float32 has none."""
    largest = torch.finfo(torch.float32).max
    groups = [[torch.full((100,), value)] for value in (1e30, 1e-30, largest / 20, largest / 2)]
    norms = gradient_norms(groups)
    assert_rounded_once(norms[:3], exact(*groups[:3]))
    assert norms[3].isinf()


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gapless_layouts_are_walked_and_others_are_left_to_pytorch(dtype):
    image = torch.randn(2, 3, 4, 5).to(dtype)
    walked = [image.contiguous(memory_format=torch.channels_last), image.transpose(0, 3), image[1:].mT, image[:, :1]]
    walked[-1] = walked[-1].new_zeros(2, 1, 4, 5).as_strided((2, 1, 4, 5), (20, 999, 5, 1)).copy_(image[:, :1])
    assert sum(t.is_contiguous() for t in walked) == 1  # a stride of a single element is none
    with backend("cpu"):
        for tensor in walked:
            assert_rounded_once(gradient_norms([[tensor]]), exact([tensor]))
    for gaps in (image[..., ::2], image[:, 0], image[:1, :1].expand(2, 3, 4, 5)):
        assert_rounded_once(gradient_norms([walked, [*walked, gaps]]), exact(walked, [*walked, gaps]))
        with backend("cpu"), pytest.raises(RuntimeError, match=r"tensors of at most 32 bits without gaps .*, got \("):
            gradient_norms([[gaps]])


@pytest.mark.parametrize(
    ("groups", "error", "sentence"),
    [
        (torch.zeros(2), TypeError, r"groups must be a list of lists of gradients, got \(2,\) float32 on cpu"),
        (None, TypeError, "groups must be a list of lists of gradients, got NoneType"),
        ([[], torch.zeros(2)], TypeError, r"groups\[1\] must be a list of gradients, got \(2,\) float32"),
        ([[], None], TypeError, r"groups\[1\] must be a list of gradients, got NoneType"),
        ([[], [1.0]], TypeError, r"groups\[1\] must have strided gradients in float32, .*, or None, got float 1.0"),
        ([[], [nn.Parameter(torch.zeros(2))]], TypeError, r"groups\[1\] must have gradients, got a parameter \(2,\)"),
        ([[torch.zeros(1)], [torch.zeros(2).long()]], TypeError, r"groups\[1\] must have .*, got \(2,\) int64 on cpu"),
        ([[torch.zeros(2).to_sparse()]], TypeError, r"groups\[0\] must have strided .*, got .*, torch.sparse_coo"),
        (
            [[torch.zeros(2)], [torch.zeros(2, device="meta")]],
            ValueError,
            "groups must have gradients on one device, got cpu, meta",
        ),
    ],
)
def test_refuses(groups, error, sentence):
    with pytest.raises(error, match=sentence):
        gradient_norms(groups)


def test_the_operator_refuses_sizes_of_another_list():
    for sizes in ([1], [1, 2], [3, -1], []):
        with pytest.raises(ValueError, match="sizes must not be negative and sum to the 2 gradients given"):
            torch.ops.vjepa.gradient_norms([torch.zeros(2), torch.zeros(2)], sizes)


@pytest.mark.usefixtures("_each_backend")
def test_opcheck():
    for gradients, sizes in ((draw(), [2, 0, 4]), ([], [0, 0]), (draw(torch.bfloat16), [6])):
        opcheck(torch.ops.vjepa.gradient_norms.default, (gradients, sizes))


@pytest.mark.usefixtures("_each_backend")
def test_compiled_equals_eager():
    torch._dynamo.reset()

    def clipped(first, second):
        norms = gradient_norms([[*first, None], [second]])
        return norms, second * (1 / norms[1]).clamp(max=1)

    compiled = torch.compile(clipped, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        first, second = draw(), torch.randn(6, 2)
        for ours, eager in zip(compiled(first, second), clipped(first, second), strict=True):
            assert torch.equal(ours, eager)


def test_compiled_refuses_parameters():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="must have gradients, got a parameter"):
        torch.compile(gradient_norms, backend="aot_eager")([[nn.Parameter(torch.zeros(2))]])


@NATIVE
def test_auto_takes_the_native_library_for_what_it_can_walk():
    for gradients, name in ((draw(), "cpu"), (draw(torch.float64), "reference")):
        assert _dispatch.select("gradient_norms", CPU, gradients, [len(gradients)]).name == name


@pytest.fixture
def mesh():
    """A mesh of two processes of which only this one exists: whatever communicates brings back what it was given."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_of_a_dtensor_the_whole_counts(mesh):
    """A replica counts once, without communication; shards communicate; both beside tensors of this process alone."""
    replica, shard, plain = (
        DTensor.from_local(torch.randn(4, 3), mesh, [p]) for p in (Replicate(), Shard(0), Shard(0))
    )
    plain = plain.to_local()
    with CommDebugMode() as communication:
        alone = gradient_norms([[replica, plain], [], [plain]])
    assert communication.get_total_counts() == 0
    wanted = exact([replica.to_local(), plain], [], [plain])
    torch.testing.assert_close(alone.double(), torch.tensor(wanted).double(), rtol=4 * ROUNDING, atol=0)
    with CommDebugMode() as communication:
        norms = gradient_norms([[shard.bfloat16(), None], [plain]])
    assert communication.get_total_counts() == 1
    assert isinstance(norms, torch.Tensor)
    assert not isinstance(norms, DTensor)
    assert_rounded_once(norms, exact([shard.to_local().bfloat16()], [plain]))
