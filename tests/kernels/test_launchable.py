"""Launches find the compiled form that Triton would take."""

import re
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from farskip_fused import _C
from farskip_fused.kernels import launchable


class Compiles:
    """In place of a kernel of Triton's: ``compile``s at each launch, and notes what its compiled forms are given."""

    def __init__(self):
        self.compiled, self.launched, self.ahead = [], [], []
        names = ("values", "count", "SIZE", "KEEP")
        self.metadata = {
            "num_ctas": 1, "num_warps": 4, "shared": 1024, "launch_cooperative_grid": False, "launch_pdl": False,
            "global_scratch_size": 0, "profile_scratch_size": 0,
        }  # fmt: skip
        self.params = [SimpleNamespace(name=name, default=False, is_constexpr=name.isupper()) for name in names]

    def warmup(self, *arguments, grid, **constants):
        self.ahead.append((arguments[1], constants["SIZE"]))

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.compiled.append((arguments, constants))
            form = len(self.compiled)

            class Compiled(SimpleNamespace):
                def __getitem__(_, grid):
                    return lambda *values: self.launched.append((form, grid, values))

            types = {"values": "*fp32", "count": "i32", "SIZE": "constexpr", "KEEP": "constexpr"}
            source = SimpleNamespace(signature=types)
            return Compiled(function=form, metadata=SimpleNamespace(**self.metadata), src=source)

        return launch


@pytest.fixture
def function(monkeypatch):
    monkeypatch.setattr(launchable, "INTERPRETED", False)
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 700 + device)
    monkeypatch.setattr(launchable, "driver", SimpleNamespace(active=active))
    return Compiles()


def test_a_form_is_compiled_once_and_launched_with_all_arguments_in_order(function):
    kernel = launchable.Kernel(function)
    values = torch.empty(16)
    kernel[(3,)](values, 32, SIZE=8, num_warps=4)
    kernel[(5, 2)](values, 48, SIZE=8, num_warps=4)
    assert len(function.compiled) == 1
    assert function.launched == [(1, (5, 2, 1), (values, 48, 8, False))]


@pytest.mark.parametrize(
    "other",
    [
        {"values": torch.zeros(16, dtype=torch.bfloat16)},  # not empty: the values are in the test's name
        {"values": torch.zeros(17)[1:]},
        {"values": None},
        {"count": 1},
        {"count": 33},
        {"count": 2**31},
        {"SIZE": 16},
        {"KEEP": True},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_specialises_for_is_another_form(function, other):
    kernel = launchable.Kernel(function)
    for changed in ({}, other, {}, other):
        call = {"values": torch.empty(16), "count": 32, "SIZE": 8, "KEEP": False, "num_warps": 4} | changed
        kernel[(1,)](call.pop("values"), call.pop("count"), **call)
    assert len(function.compiled) == 2
    assert [form for form, *_ in function.launched] == [1, 2]


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_forms_are_compiled_ahead_once_each_and_nothing_is_launched(function, without_gpu):
    kernel, other = launchable.Kernel(function), launchable.Kernel(Compiles())
    values = torch.empty(16)

    def launches():
        for size in (8, 16, 8):
            kernel[(1,)](values, 32, SIZE=size)
        other[(1,)](values, 32, SIZE=8)

    assert launchable.compile_ahead(launches, torch.device("cuda"))
    assert sorted(function.ahead) == [(32, 8), (32, 16)]
    assert other.function.ahead == [(32, 8)]
    assert function.compiled == function.launched == []
    launches()
    assert len(function.compiled) == 2
    assert len(function.launched) == 1
    assert not launchable.compile_ahead(launches, torch.device("cuda"))  # a second layer has nothing to load
    assert len(function.ahead) == 2


def test_ranks_begin_to_compile_at_different_forms(function, without_gpu, monkeypatch):
    monkeypatch.setattr(launchable.os, "sched_getaffinity", lambda _: {0})  # one thread, so that there is an order
    orders = []
    for rank in range(3):
        kernel = launchable.Kernel(Compiles())
        launchable.compile_ahead(
            lambda kernel=kernel: [kernel[(1,)](None, 32, SIZE=size) for size in range(6)],
            torch.device("cuda"),
            rank,
            3,
        )
        orders.append([size for _, size in kernel.function.ahead])
    assert orders == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1], [4, 5, 0, 1, 2, 3]]


def test_what_does_not_compile_ahead_says_why_and_later_launches_are_done(function, without_gpu):
    kernel = launchable.Kernel(function)
    with pytest.raises(KeyError, match="SIZE"):
        launchable.compile_ahead(lambda: kernel[(1,)](None, 32, OTHER=8), torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        launchable.compile_ahead(lambda: 1 // 0, torch.device("cuda"))
    kernel[(1,)](None, 32, SIZE=8)
    assert len(function.compiled) == 1


ROOT = Path(__file__).parents[2]
# What a layer's set-up launches: while forms are noted, what is no Kernel would run on memory that nobody has filled.
SOURCES = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "bench" / "pull.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_whatever_is_launched_is_a_kernel(path):
    text = path.read_text()
    launched = set(re.findall(r"^ +(\w+)\[(?:\(|grid\])", text, re.MULTILINE)) - {"compiled"}
    launched |= set(re.findall(r"(\w+)\.of_one_form\(", text))
    decorated = set(re.findall(r"^ *@Kernel\n *@\w+\.jit(?:\([^\n]*\))?\n *def (\w+)", text, re.MULTILINE))
    assert launched == decorated


@pytest.fixture
def prepared(monkeypatch):
    """What launches that were prepared were made of and given."""
    calls = []

    def prepare(*made):
        calls.append(made)
        return lambda *given: calls.append(given)

    monkeypatch.setattr(_C, "Launch", prepare)
    return calls


def test_launches_of_one_form_look_at_the_first_arguments_alone(function, without_gpu, prepared):
    kernel = launchable.Kernel(function)
    launch = kernel.of_one_form(SIZE=8, KEEP=True)
    values, others = torch.empty(16), torch.empty(16)
    assert launchable.compile_ahead(lambda: launch((1,), values, 32), torch.device("cuda"))
    assert function.ahead == [(32, 8)]
    assert function.compiled == prepared == []
    launch((3,), values, 32)
    assert len(function.compiled) == 1
    assert prepared.pop() == (1, 128, 1024, ["*fp32", "i32"])
    launch((5, 2), others, 33)
    launch((6,), others, 34, stream=SimpleNamespace(cuda_stream=900))
    assert prepared == [(700, (5, 2), others, 33), (900, (6,), others, 34)]
    assert not launchable.compile_ahead(lambda: launch((1,), values, 32), torch.device("cuda"))
    assert len(prepared) == 2
    launch((7,), values, 32)
    assert prepared[2] == (700, (7,), values, 32)
    assert len(function.compiled) == 1
    assert function.launched == []


def test_the_first_launch_of_one_form_is_on_the_stream_that_is_given(function, prepared, monkeypatch):
    launched_on, current = [], ["current"]

    @contextmanager
    def stream(given):
        current.append(given)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    kernel = launchable.Kernel(function)
    compile_form = Compiles.__getitem__
    monkeypatch.setattr(
        Compiles, "__getitem__", lambda self, grid: launched_on.append(current[-1]) or compile_form(self, grid)
    )
    kernel.of_one_form(SIZE=8, KEEP=True)((1,), torch.empty(16), 32, stream="communication")
    kernel.of_one_form(SIZE=16, KEEP=True)((1,), torch.empty(16), 32)
    assert launched_on == ["communication", "current"]


@pytest.mark.parametrize(
    "wants", [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 128}, {"profile_scratch_size": 8}], ids=str
)
def test_what_takes_more_than_its_arguments_is_launched_by_triton_every_time(function, prepared, wants):
    function.metadata |= wants
    launch = launchable.Kernel(function).of_one_form(SIZE=8, KEEP=True)
    values = torch.empty(16)
    launch((1,), values, 32)
    launch((2,), values, 32)
    assert prepared == []
    assert len(function.compiled) == 1
    assert function.launched == [(1, (2, 1, 1), (values, 32, 8, True))]


def test_constants_among_the_arguments_are_refused(function):
    with pytest.raises(AssertionError):
        launchable.Kernel(function)[(1,)](torch.empty(16), 32, 8)


def test_two_arguments_of_one_form_are_one_to_triton():
    def takes(argument):
        pass

    kernel = JITFunction(takes)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values = torch.empty(64, 64)
    tensors = [values, values.half(), values.flatten()[1:], values.flatten()[4:], values[:0]]
    blocks = (values, [16, 16]), (values, [32, 16]), (values.half(), [16, 16]), (values[:32], [16, 16])
    descriptors = [TensorDescriptor.from_tensor(tensor, block) for tensor, block in blocks]
    edges = [sign * 2**power + near for sign in (-1, 1) for power in (0, 4, 31, 32, 62) for near in (-1, 0, 1)]
    arguments = [None, True, False, 1.0, 0.5, *edges, 2**63 - 1, 2**63, 2**63 + 1, *tensors, *descriptors]
    forms = [(launchable._form(argument), bind(argument)[1]) for argument in arguments]
    for (ours, tritons), (other, others) in combinations(forms, 2):
        assert ours != other or tritons == others
    assert len({str(tritons) for _, tritons in forms}) > 12
