"""Train, stop, go on: checkpoints that are written in the background and load on any number of processes.

python examples/resume.py --demo                                     2 processes, stopped half way, then 3; compared with one run
torchrun --nproc-per-node 2 examples/resume.py --steps 40            run it twice: the second goes on where the first one ended
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from elastic import train


def losses_of(folder: Path, steps: int, stop: int) -> list[tuple[int, float]]:
    """(step, loss) of the steps that this program ran: the loop of elastic.py."""
    losses: list[tuple[int, float]] = []

    def told(what: str, step: int, loss: float) -> None:
        if what == "step":
            losses.append((step, loss))

    train(folder, steps, stop=stop, told=told)
    if os.environ["RANK"] == "0" and losses:
        print(f"steps {losses[0][0]} to {losses[-1][0]}: loss {losses[0][1]:.6f} → {losses[-1][1]:.6f}", flush=True)
    return losses


def demo(steps: int) -> int:
    """One run of 2 processes; and one that stops half way and goes on with 3. 0 when their losses agree."""
    with tempfile.TemporaryDirectory() as name:
        runs = {"whole": [(2, steps)], "in two": [(2, steps // 2), (3, steps)]}
        losses: dict[str, dict[int, float]] = {}
        for run, parts in runs.items():
            for processes, stop in parts:
                out = Path(name, "losses.json")
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
                options = ["--folder", str(Path(name, run)), "--steps", str(steps), "--stop", str(stop), "--losses", str(out)]
                subprocess.run([*torchrun, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                losses.setdefault(run, {}).update({int(s): x for s, x in json.loads(out.read_text())})
    difference = max(abs(x - losses["in two"][s]) / x for s, x in losses["whole"].items())
    print(f"largest relative difference of the two runs' losses over {steps} steps: {difference:.1e}")
    return 0 if difference < 1e-4 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, stop, go on.")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stop", type=int, default=sys.maxsize, help="end after this step")
    parser.add_argument("--losses", type=Path, help="write them here, as JSON")
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    if args.demo:
        return demo(args.steps)
    losses = losses_of(args.folder, args.steps, args.stop)
    if args.losses and os.environ["RANK"] == "0":
        args.losses.write_text(json.dumps(losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
