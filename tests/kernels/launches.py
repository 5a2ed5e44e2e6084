"""Launches the Triton kernels of a training step for 100 masks, without a GPU: everything but the kernels themselves runs.

    python tests/kernels/launches.py step       the public operators, forward and backward, at the widths of ViT-L
    python tests/kernels/launches.py careless   a kernel that is specialised on the number of tokens, which must be seen

Triton is given a driver that claims to be a GPU of compute capability 9.0 and whose launches do nothing. So Triton binds
and specialises arguments, looks into its cache and compiles as on that GPU, while the tensors, in the CPU's memory, are
never read by a kernel, and what the kernels should have written is whatever lay there. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any
from unittest.mock import patch

import ahead_of_time
import careless
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vjepa.kernels import (
    TokenIndices,
    _dispatch,
    add_layer_norm,
    backend,
    gather_tokens,
    masked_l1_loss,
    mlp,
    predictor_tokens,
    scatter_tokens,
    tubelet_embed,
    varlen_attention,
)

ARCH = 90
MASKS = 100
WARM_UP = 2  # masks after which nothing may be compiled
ONE = 5  # the mask of a single token
CLIPS, FRAMES, SIZE = 2, 16, 224
TUBELET, PATCH = 2, 16
LENGTH = FRAMES // TUBELET * (SIZE // PATCH) ** 2
WIDTH, NARROW = 1024, 384  # of the encoder and of the predictor of ViT-L
HEADS = 16


class Launcher:
    """What Triton builds to launch one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None: ...


class Utilities:
    """What Triton asks of the driver's library."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, most threads of a block

    def unload_module(self, module: object) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": ahead_of_time.SHARED[ARCH], "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    """A GPU that does nothing."""

    utils = Utilities()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


compiled: list[dict[str, Any]] = []


def record(*, fn: Any, compile: dict[str, Any], **rest: Any) -> None:
    """Triton calls this after each compilation."""
    names, attributes = fn.jit_function.arg_names, compile["configs"][0]
    compiled.append(
        {
            "kernel": f"{fn.module}.{fn.name}",
            "types": dict(compile["signature"]),
            "constants": {names[place[0]]: value for place, value in compile["constants"].items()},
            "divisible": [names[place[0]] for place, given in attributes.items() if given],
            **{option: compile[option] for option in ("num_warps", "num_stages", "enable_fp_fusion")},
        }
    )


def ahead() -> list[dict[str, Any]]:
    """What is compiled ahead of time, as `record` would see it."""
    found = []
    for variant in (variant for module in ahead_of_time.modules() for variant in ahead_of_time.variants(module)):
        types, constants, divisible = ahead_of_time.specialisation(variant)
        found.append(
            {
                "kernel": name_of(variant.kernel),
                "types": types,
                "constants": constants,
                "divisible": list(divisible),
                **ahead_of_time.options(variant),
            }
        )
    return found


def nearest(launch: dict[str, Any], listed: list[dict[str, Any]]) -> str:
    """How a launch that is no variant differs from the variant of this kernel that is most like it."""

    def facts(kernel: dict[str, Any]) -> dict[str, Any]:
        flat = {key: value for key, value in kernel.items() if not isinstance(value, dict | list)}
        flat.update({f"type of {name}": kind for name, kind in kernel["types"].items()})
        flat.update({f"value of {name}": value for name, value in kernel["constants"].items()})
        flat.update({f"{name} % 16": 0 for name in kernel["divisible"]})
        return flat

    ours, differences = facts(launch), []
    for theirs in (facts(kernel) for kernel in listed if kernel["kernel"] == launch["kernel"]):
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        differences.append([f"{name}: {ours.get(name)}, variant: {theirs.get(name)}" for name in names])
    return f"{launch['kernel']}: {'; '.join(min(differences, key=len, default=['no variant']))}"


def name_of(kernel: Any) -> str:
    return f"{kernel.module}.{kernel.__name__}"


def kernels() -> set[str]:
    """Every kernel there is, other than the functions that kernels call."""
    found = [vars(import_module(f"vjepa.kernels.{module}")).values() for module in ahead_of_time.modules()]
    functions = [value for values in found for value in values if isinstance(value, triton.JITFunction)]
    return {name_of(function) for function in functions if function.__name__.endswith("_kernel")}


def random_sets(mask: int, count: int, generator: torch.Generator) -> TokenIndices:
    """`count` ragged sets of the clips; the totals on which Triton specialises, 1 and 16 n, come after the warm-up."""
    lengths = 2 * torch.randint(1, 200, (count,), generator=generator)
    if mask % 3 == WARM_UP:
        lengths = (lengths + 15) // 16 * 16
    else:
        lengths[0] += 1 - lengths.sum() % 2
    if mask == ONE:
        lengths[:] = 1
    clip = torch.arange(count) % CLIPS
    sets = [torch.randint(LENGTH, (int(n),), generator=generator) for n in lengths]
    packed = TokenIndices.from_sets(sets, clip=clip)
    return TokenIndices(packed.indices, packed.cu_seqlens, packed.clip, packed.lengths, num_clips=CLIPS)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


class Step:
    """The operators as a training step in bfloat16 calls them, dtypes included; whatever stands between them is left out."""

    def __init__(self) -> None:
        self.video = torch.zeros(CLIPS, 3, FRAMES, SIZE, SIZE, dtype=torch.uint8)
        self.weight = parameter(WIDTH, 3, TUBELET, PATCH, PATCH, dtype=torch.bfloat16)
        self.bias = parameter(WIDTH, dtype=torch.bfloat16)
        self.mask_tokens = parameter(2, NARROW)
        self.positions = torch.zeros(LENGTH, WIDTH)
        self.narrow_positions = torch.zeros(LENGTH, NARROW)
        self.features = torch.zeros(CLIPS, LENGTH, WIDTH)
        self.tokens = parameter(CLIPS, LENGTH, WIDTH, dtype=torch.bfloat16)

    def __call__(self, context: TokenIndices, target: TokenIndices, kind: Tensor) -> None:
        norm = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}
        tubelet_embed(self.video, self.weight, self.bias, self.positions, **norm)
        embedded = tubelet_embed(self.video, self.weight, self.bias, self.positions, context, **norm)
        self.backward(embedded, self.weight, self.bias)
        packed = parameter(context.total, NARROW, dtype=torch.bfloat16)
        with patch.object(TokenIndices, "__post_init__"):  # it would check the offsets that no kernel wrote
            tokens, _ = predictor_tokens(packed, self.mask_tokens, self.narrow_positions, context, target, kind)
        self.backward(tokens, packed, self.mask_tokens)
        rows = parameter(target.total, WIDTH, dtype=torch.bfloat16)
        self.backward(masked_l1_loss(rows, self.features, target), rows)
        weights = torch.ones(target.total)
        self.backward(masked_l1_loss(rows, self.features.bfloat16(), target, weights=weights), rows)
        self.backward(gather_tokens(self.tokens, target), self.tokens)
        self.backward(scatter_tokens(rows, target, LENGTH), rows)
        self.backward(scatter_tokens(rows, target, LENGTH, fill=self.bias), rows, self.bias)

        for width in (WIDTH, NARROW):
            self.attend(width, context)
            self.normalise(width, context.total)
            self.transform(width, context.total)

    def attend(self, width: int, sets: TokenIndices) -> None:
        qkv = parameter(sets.total, 3, HEADS, width // HEADS, dtype=torch.bfloat16)
        self.backward(varlen_attention(*qkv.unbind(1), sets.cu_seqlens, sets.lengths), qkv)

    def normalise(self, width: int, total: int) -> None:
        """The first norm of a network, one inside, and the last, whose sum is not used."""
        residual, affine = parameter(total, width), (parameter(width), parameter(width))
        branch = parameter(total, width, dtype=torch.bfloat16)
        self.backward(add_layer_norm(residual, None, *affine, dtype=torch.bfloat16)[1], residual, *affine)
        outputs = add_layer_norm(residual, branch, *affine, dtype=torch.bfloat16)
        inputs = (residual, branch, *affine)
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs], retain_graph=True)
        self.backward(outputs[1], *inputs)

    def transform(self, width: int, total: int) -> None:
        kinds = (total, width), (4 * width, width), (4 * width,), (width, 4 * width), (width,)
        inputs = [parameter(*shape, dtype=torch.bfloat16) for shape in kinds]
        with torch.no_grad():
            mlp(*inputs)
        self.backward(mlp(*inputs), *inputs)

    def backward(self, output: Tensor, *inputs: Tensor) -> None:
        torch.autograd.grad(output, inputs, torch.zeros_like(output))


def careless_step(context: TokenIndices, target: TokenIndices, kind: Tensor) -> None:
    out = torch.zeros(context.total, dtype=torch.int32)
    careless.specialised_kernel[triton.cdiv(context.total, 128),](out, context.total, R=128)


def main(mode: str) -> None:
    if "TRITON_INTERPRET" in os.environ:
        sys.exit("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    driver.set_active(Driver())
    triton.knobs.runtime.jit_post_compile_hook = record
    # the kernels are to serve tensors on the CPU, if they fit them
    _dispatch.Row.obstacle = lambda self, device, *arguments: self.unfit(*arguments) if arguments else None
    generator, step = torch.Generator().manual_seed(0), {"step": Step, "careless": lambda: careless_step}[mode]()
    counts = []
    with backend("triton"):
        for mask in range(MASKS):
            count = 1 if mask == ONE else int(torch.randint(CLIPS, 4 * CLIPS, (), generator=generator))
            context = random_sets(mask, count, generator)
            target = random_sets(mask, count, generator)
            step(context, target, torch.arange(count) % 2)
            counts.append(len(compiled))
    report: dict[str, Any] = {"late": compiled[counts[WARM_UP - 1] :]}
    if mode == "step":
        listed, launched = ahead(), {kernel["kernel"] for kernel in compiled}
        report["unlisted"] = [nearest(kernel, listed) for kernel in compiled if kernel not in listed]
        report["without_variant"] = sorted(kernels() - {kernel["kernel"] for kernel in listed})
        report["not_launched"] = sorted(kernels() - launched)
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
