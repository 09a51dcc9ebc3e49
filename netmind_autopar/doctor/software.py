"""What is installed, and whether it fits together."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from .findings import Finding

PART = "software"
TORCH = (2, 11)
TRITON_OF_NUMPY = ((3, 7), (2, 4))  # a Triton before the first cannot interpret kernels with a numpy from the second on


def look() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(PART, "python", python, *(("ok", "") if sys.version_info >= (3, 11) else ("wrong", "install Python 3.11 or later")))
    yield from _torch()
    yield from _solver()
    yield _triton(version("triton"), version("numpy"), bool(os.environ.get("TRITON_INTERPRET")))


def version(package: str) -> str:
    """Its version as installed; empty when it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def _torch() -> Iterator[Finding]:
    if numbers(torch.__version__)[:2] < TORCH:
        yield Finding(PART, "torch", torch.__version__, "wrong", f"install torch {'.'.join(map(str, TORCH))} or later")
    else:
        built = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"
        yield Finding(PART, "torch", built)
    there = Path("/dev/nvidia0").exists()
    if there and torch.version.cuda is None:
        yield Finding(
            PART, "CUDA", "a GPU is here, and this torch is built for CPUs", "wrong", "install a CUDA build of torch (pytorch.org)"
        )
    elif torch.version.cuda and not torch.cuda.is_available():
        why = "this torch is built for CUDA, and no GPU can be used"
        do = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, run it with --gpus all"
        yield Finding(PART, "CUDA", why, "wrong" if there else "note", do)
    have = dist.is_available() and dist.is_gloo_available()
    yield Finding(PART, "gloo", "yes", *(() if have else ("wrong", "install a torch with torch.distributed and gloo")))  # type: ignore[arg-type]
    if torch.cuda.is_available():
        nccl = dist.is_available() and dist.is_nccl_available()
        shown = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "no"
        yield Finding(PART, "nccl", shown, *(() if nccl else ("wrong", "install a torch with NCCL")))  # type: ignore[arg-type]


def _solver() -> Iterator[Finding]:
    pulp, highs = version("pulp"), version("highspy")
    shown = f"PuLP {pulp or 'missing'}, HiGHS {highs or 'missing'}"
    if not pulp or not (3, 3, 1) <= numbers(pulp) < (4,):
        yield Finding(PART, "solver", shown, "wrong", 'pip install "pulp>=3.3.1,<4"')
    elif not highs:
        yield Finding(PART, "solver", shown, "note", "pip install highspy: without it plans take several times longer")
    else:
        yield Finding(PART, "solver", shown)


def _triton(triton: str, numpy: str, interpreted: bool) -> Finding:
    if not triton:
        return Finding(PART, "triton", "not installed: fused ops run as plain PyTorch", "note" if torch.cuda.is_available() else "ok")
    first, from_numpy = TRITON_OF_NUMPY
    if numbers(triton)[:2] < first and numbers(numpy)[:2] >= from_numpy:
        text = f"{triton} with numpy {numpy}: its interpreter fails with this numpy"
        return Finding(PART, "triton", text, "wrong" if interpreted else "note", 'pip install "numpy<2.4", or a newer triton')
    return Finding(PART, "triton", f"{triton}, numpy {numpy}" + (", interpreted (TRITON_INTERPRET is set)" if interpreted else ""))
