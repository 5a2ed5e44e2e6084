"""Importing vjepa.kernels: torch alone, quickly, and nothing else happens; and the diagnostics of `python -m`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import torch

from vjepa.kernels import _dispatch

PROBE = """
import json, sys, time
import torch
torch.library.define("probe::op", "(Tensor x) -> Tensor")  # torch loads parts of itself when operators are registered
torch.library.register_fake("probe::op", torch.empty_like)
torch.library.register_autograd("probe::op", lambda ctx, grad: grad)
torch.manual_seed(5)
state = torch.random.get_rng_state()
loaded = set(sys.modules)
start = time.process_time()
import vjepa.kernels
seconds = time.process_time() - start
print(json.dumps({
    "new": sorted(set(sys.modules) - loaded),
    "cuda": torch.cuda.is_initialized(),
    "same_rng": torch.equal(state, torch.random.get_rng_state()),
    "seconds": seconds,
    "names": sorted(vjepa.kernels.__all__),
    "operators": sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vjepa::")),
}))
"""


NAMES = [
    "AdamWEMA",
    "EMA",
    "TokenIndices",
    "add_layer_norm",
    "apply_masks",
    "backend",
    "ema_update_",
    "gather_tokens",
    "gradient_norms",
    "masked_l1_loss",
    "mlp",
    "predictor_tokens",
    "scatter_tokens",
    "tubelet_embed",
    "varlen_attention",
]
WITHOUT_BACKWARD = ("adamw_ema_", "ema_update_", "gradient_norms")
WITH_BACKWARD = tuple(op for op in _dispatch.operators() if op not in WITHOUT_BACKWARD)
BACKWARD = tuple(f"{op}_backward" for op in WITH_BACKWARD)
IN_TRITON = (
    *(
        "add_layer_norm",
        "gather_tokens",
        "masked_l1_loss",
        "mlp",
        "predictor_tokens",
        "scatter_tokens",
        "tubelet_embed",
    ),
    "varlen_attention",
)
WITHOUT_TRITON = re.compile(
    r"triton: (Triton serves CPU tensors only under its interpreter: set TRITON_INTERPRET=1|Triton is not installed)"
)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, _dispatch.VARIABLE: "auto", **environment},
        cwd="/",
        check=False,
    )


def test_import_has_no_side_effect():
    done = run("-c", PROBE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = [name for name in found["new"] if name.split(".")[0] == "vjepa"]
    assert all(name == "vjepa" or name.startswith("vjepa.kernels") for name in ours), ours
    others = {name.split(".")[0] for name in found["new"]} - {"vjepa", "torch"} - set(sys.stdlib_module_names)
    assert not others  # triton among them
    assert not found["cuda"]
    assert found["same_rng"]
    assert found["seconds"] < 2
    assert found["names"] == NAMES
    assert found["operators"] == sorted(f"vjepa::{name}" for name in (*WITHOUT_BACKWARD, *WITH_BACKWARD, *BACKWARD))


def test_importing_the_folder_under_another_name_is_refused():
    folder = os.path.dirname(os.path.dirname(_dispatch.__file__))
    done = run("-c", f"import sys; sys.path.insert(0, {folder!r}); import kernels")
    assert done.returncode != 0
    assert "this package is vjepa.kernels, but it was imported as 'kernels'" in done.stderr


def test_diagnostics():
    done = run("-m", "vjepa.kernels", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert torch.__version__ in lines["torch"]
    for op in _dispatch.operators():
        assert lines[op].split()[1] in ("sdpa", "cpu", "reference"), lines[op]
    assert "backends on cpu (VJEPA_KERNELS=auto)" in done.stdout
    assert "sdpa: can run, reference: can run" in lines["varlen_attention"]
    assert "not cuda: it serves tensors on a CUDA device (adamw_ema_, ema_update_, gradient_norms)" in done.stdout
    assert "not flash_attn_2: it serves CUDA devices, not cpu (varlen_attention)" in done.stdout
    (why,) = (line for line in done.stdout.splitlines() if WITHOUT_TRITON.search(line))
    assert set(IN_TRITON) <= set(re.split(r"[(), ]+", why))


def test_diagnostics_of_triton():
    """Where the interpreter is asked for, Triton can serve the CPU; asked for by name without it, it says why not."""
    interpreted = run("-m", "vjepa.kernels", TRITON_INTERPRET="1")
    compiled = run("-m", "vjepa.kernels", VJEPA_KERNELS="triton", TRITON_INTERPRET="0")
    assert interpreted.returncode == compiled.returncode == 0, interpreted.stderr + compiled.stderr
    for op in IN_TRITON:
        assert re.search(rf"{op} .*triton: (runs if asked for|can run|Triton is not installed)", interpreted.stdout)
        assert re.search(rf"{op} .*NONE: the backend triton cannot serve {op} on cpu: Triton ", compiled.stdout)
    assert re.search(r"ema_update_ +(cpu|reference) ", compiled.stdout)  # has no such backend, so it stays on auto


def test_diagnostics_of_a_forced_backend():
    forced = run("-m", "vjepa.kernels", VJEPA_KERNELS="flash_attn")
    assert forced.returncode == 0
    assert "varlen_attention  NONE: the backend flash_attn cannot serve varlen_attention on cpu: " in forced.stdout
    unknown = run("-m", "vjepa.kernels", VJEPA_KERNELS="fastest")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("the environment variable VJEPA_KERNELS must be one of auto")
