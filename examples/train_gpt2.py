"""Train an unmodified Hugging Face GPT-2 on the sources of Python's standard library, one byte per token.

    python examples/train_gpt2.py                                            one process, the model as it is
    torchrun --nproc-per-node 4 examples/train_gpt2.py                       four processes, one call to autoparallelize
    python examples/train_gpt2.py --demo                                     both, and the largest difference of the losses

Dropout is off, so that both runs compute the same numbers up to the order of floating-point additions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

BATCH, SEQ = 16, 64
TOLERANCE = 1e-3
CONFIG = {
    "vocab_size": 256,
    "n_positions": SEQ,
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def read_text(limit: int = 4_000_000) -> torch.Tensor:
    """Up to `limit` bytes of the standard library's own sources, in alphabetical order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = bytearray()
    for path in sorted(folder.glob("*.py")):
        data += path.read_bytes()
    return torch.frombuffer(data[:limit], dtype=torch.uint8).long()


def batches(steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """The same random pieces of the text on every process and in every run."""
    text, random = read_text(), torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(text) - SEQ, (BATCH,), generator=random)
        tokens = torch.stack([text[i : i + SEQ] for i in starts.tolist()])
        yield {"input_ids": tokens, "labels": tokens}


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**CONFIG))


def parallelize(model: torch.nn.Module, sample: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The one call. Half of the processes along one mesh axis, half along the other."""
    from torch.distributed.device_mesh import init_device_mesh

    from netmind_autopar import autoparallelize

    torch.distributed.init_process_group("gloo")
    world = torch.distributed.get_world_size()
    shape = (2, world // 2) if world % 2 == 0 else (1, world)
    return autoparallelize(model, sample, init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")))


def train(steps: int, title: str) -> list[float]:
    """Losses of `steps` steps of AdamW; parallel when launched by torchrun."""
    model: Any = build()
    first = next(batches(1))
    quiet = int(os.environ.get("RANK", "0")) != 0
    if "RANK" in os.environ:
        original, model = model, parallelize(model, first)
        if not quiet:
            show_plan(model.plan, original)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses: list[float] = []
    with progress(steps, title, quiet) as advance:
        for batch in batches(steps):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            advance(losses[-1])
    return losses


def show_plan(plan: Any, model: torch.nn.Module) -> None:
    from netmind_autopar import report

    rows = report.parameter_rows(plan, model.named_parameters())
    print(report.render(report.plan_report(plan, type(model).__name__, rows), report.console().width), flush=True)


@contextmanager
def progress(steps: int, title: str, quiet: bool) -> Iterator[Any]:
    """A bar with the loss on a terminal, a line every ten steps elsewhere, nothing when quiet."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start, done = time.perf_counter(), 0
    if quiet or not sys.stdout.isatty():

        def line(loss: float) -> None:
            nonlocal done
            done += 1
            if not quiet and (done == 1 or done % 10 == 0 or done == steps):
                print(f"{title}   step {done:3d}/{steps}   loss {loss:.4f}   {time.perf_counter() - start:5.1f} s", flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=steps, loss=float("nan"))
        yield lambda loss: bar.update(task, advance=1, loss=loss)


def demo(steps: int, processes: int) -> int:
    """Train on several processes, train on one, compare. The exit code: 0 when the losses agree and fell."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        parallel, single = Path(folder, "parallel.json"), Path(folder, "single.json")
        common = [str(Path(__file__).resolve()), "--steps", str(steps), "--losses"]
        # one thread a process: four processes that start as many threads as there are cores only get in each other's way
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        for command in ([*torchrun, *common, str(parallel)], [sys.executable, *common, str(single)]):
            if code := subprocess.run(command, env=env, check=False).returncode:
                print(f"FAILED with exit code {code}: {' '.join(command)}", file=sys.stderr)
                return 1
        many, one = json.loads(parallel.read_text()), json.loads(single.read_text())
    difference = max(abs(a - b) for a, b in zip(many, one, strict=True))
    fell = sum(many[-5:]) < 0.8 * sum(many[:5])
    print(f"\nloss {many[0]:.4f} → {many[-1]:.4f} on {processes} processes, {one[0]:.4f} → {one[-1]:.4f} on one")
    print(f"largest difference of the two runs over {steps} steps: {difference:.1e} (at most {TOLERANCE:.0e} allowed)")
    print(f"{time.perf_counter() - start:.0f} s in all")
    if not (difference <= TOLERANCE and fell):
        print("FAILED: " + ("the loss did not fall" if difference <= TOLERANCE else "the two runs differ"), file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Train GPT-2 on the standard library's sources.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--losses", help="write the losses to this file, as JSON")
    parser.add_argument("--demo", action="store_true", help="train on several processes and on one, and compare")
    parser.add_argument("--processes", type=int, default=4, help="with --demo: how many processes")
    args = parser.parse_args()
    if args.demo:
        return demo(args.steps, args.processes)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    losses = train(args.steps, f"{world} process{'es' * (world > 1)}")
    if args.losses and os.environ.get("RANK", "0") == "0":
        Path(args.losses).write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
