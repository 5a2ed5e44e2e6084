"""Calls of the native attention that are refused before anything is written."""

from __future__ import annotations

import ctypes

import pytest
import torch

from vjepa.kernels import _cpu_attention, _native

REASON = _cpu_attention.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# What is wrong: fields of the description, other arguments, and what the refusal says.
BAD = {
    "threads": ({}, {"threads": 0}, "the number of threads is less than 1"),
    "dtype": ({"dtype": 2}, {}, "a dtype is none of those"),
    "no instructions": ({"instructions": 0}, {}, "lacks the instructions"),
    "unknown instructions": ({"instructions": 17}, {}, "lacks the instructions"),
    "no scale": ({"scale": 0.0}, {}, "the scale is not a positive, finite number"),
    "negative scale": ({"scale": -1.0}, {}, "the scale is not a positive, finite number"),
    "infinite scale": ({"scale": float("inf")}, {}, "the scale is not a positive, finite number"),
    "scale that is no number": ({"scale": float("nan")}, {}, "the scale is not a positive, finite number"),
    "sequences": ({"sequences": -1}, {}, "a size is negative"),
    "tokens": ({"tokens": -1}, {}, "a size is negative"),
    "kv_tokens": ({"kv_tokens": -1}, {}, "a size is negative"),
    "heads": ({"heads": -1}, {}, "a size is negative"),
    "too many heads": ({"heads": 2**60}, {}, "a size is negative, too large"),
    "too many tokens": ({"tokens": 2**62}, {}, "a size is negative, too large"),
    "no features": ({"head_dim": 0}, {}, "a size is negative, too large"),
    "too many features": ({"head_dim": 257}, {}, "a size is negative, too large"),
    "no lengths": ({"lengths": None}, {}, "a pointer to at least one element is null"),
    "no kv_lengths": ({"kv_lengths": None}, {}, "a pointer to at least one element is null"),
    "more tokens": ({"tokens": 8}, {}, "lengths are not those of the tokens"),
    "fewer keys": ({"kv_tokens": 6}, {}, "lengths are not those of the tokens"),
    "a negative length": ({}, {"lengths": (8, -1)}, "lengths are not those of the tokens"),
    "an overflow of lengths": ({}, {"lengths": (2**63 - 1, 9)}, "lengths are not those of the tokens"),
    "queries without keys": ({}, {"kv_lengths": (0, 7)}, "lengths are not those of the tokens"),
    "null": ({}, {"null": True}, "a pointer to at least one element is null"),
    "misaligned": ({}, {"misaligned": True}, "a pointer is not aligned to its element type"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_before_anything_is_written(case):
    fields, others, sentence = BAD[case]
    q, k, v, grad = torch.randn(4, 7, 2, 5).unbind()
    lengths = [torch.tensor((3, 4)), torch.tensor((3, 4))]
    for place, name in enumerate(("lengths", "kv_lengths")):
        if name in others:
            lengths[place] = torch.tensor(others[name])
    given = _cpu_attention._about(q, k, *lengths, 0.5)
    for name, value in fields.items():
        setattr(given, name, value)
    library, threads = _cpu_attention._library(), others.get("threads", 2)
    written = [torch.full_like(x, 7.0) for x in (q, k, v)]
    lse = torch.full((2, 7), 7.0)
    calls = {
        3: lambda heads, *to: library.vjepa_attention_cpu(given, heads, to[0], lse.data_ptr(), threads),
        5: lambda heads, *to: library.vjepa_attention_backward_cpu(given, heads, lse.data_ptr(), *to, threads),
    }
    for count, call in calls.items():
        addresses = [x.data_ptr() for x in written]
        places = range(count) if {"null", "misaligned"} & others.keys() else [0]
        for place in places:
            heads = _cpu_attention._heads(q, k, v, q, grad)
            if "null" in others:
                heads[place].data = None
            if "misaligned" in others:
                heads[place].data += 2
            with pytest.raises(_native.NativeError, match=sentence):
                _native.check(call(heads, *addresses))
        if others.keys() & {"null", "misaligned"}:
            for place in range(1 if count == 3 else 3):
                wrong = [*addresses]
                wrong[place] = None if "null" in others else addresses[place] + 1
                with pytest.raises(_native.NativeError, match=sentence):
                    _native.check(call(_cpu_attention._heads(q, k, v, q, grad), *wrong))
    for x in (*written, lse):
        assert torch.equal(x, torch.full_like(x, 7.0))


def test_without_a_description_nothing_is_done():
    library, heads = _cpu_attention._library(), _cpu_attention._heads(torch.zeros(1, 1, 1))
    for call, addresses in ((library.vjepa_attention_cpu, 2), (library.vjepa_attention_backward_cpu, 4)):
        for first, second in ((None, heads), (ctypes.pointer(_cpu_attention.About()), None)):
            with pytest.raises(_native.NativeError, match="null"):
                _native.check(call(first, second, *(None,) * addresses, 1))
