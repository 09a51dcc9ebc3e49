"""The command line: netmind-autopar plan | explain | diff | verify | calibrate | doctor | mesh | clusters.

Exit codes: 0 done; 1 `verify` or `diff` found a difference, `doctor` something wrong; 2 bad input, told on stderr with what to try;
3 a defect of this package; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from . import modelfile, report
from .ir.errors import AutoparError, InputError
from .ir.flags import debug_level
from .ir.plan import Plan
from .ir.precision import Precision

OK, DIFFERS, BAD_INPUT, DEFECT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

EXAMPLES = """examples:
  netmind-autopar plan examples/gpt2.py --mesh dp=2,tp=4 --cluster h100-sxm --memory 70GiB --json plan.json
  netmind-autopar plan --hf config.json --batch 8 --seq 1024 --mesh dp=4,tp=8 --cluster h100-sxm
  netmind-autopar plan --hf config.json --batch 64 --devices 64 --cluster dgx-h100 --compare
  netmind-autopar explain plan.json examples/gpt2.py
  netmind-autopar verify examples/gpt2.py --plan plan.json --steps 3
"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are InputErrors like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError("cannot read the command line", where=" ".join(sys.argv[1:]), why=message, try_=f"{self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="netmind-autopar",
        description="Plan, explain and check how a PyTorch model is split over devices.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"netmind-autopar {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    sub = command("plan", run_plan, "decide how a model is split over a mesh: no GPU, no process group, no weights")
    _model_options(sub)
    _plan_options(sub)

    sub = command("explain", run_explain, "show a plan file; with the model also what becomes of every parameter")
    sub.add_argument("plan", metavar="PLAN", help="a file written by `plan --json`")
    _model_options(sub)
    sub.add_argument("--all", "--verbose", dest="all", action="store_true", help="every choice, and long tables in full")

    sub = command("diff", run_diff, "show what differs between two plan files; exit code 1 if anything does")
    sub.add_argument("a", metavar="A")
    sub.add_argument("b", metavar="B")

    sub = command("verify", run_verify, "run every rank of a plan in one process and compare with the model; exit code 1 if they differ")
    _model_options(sub)
    sub.add_argument("--plan", required=True, metavar="PLAN", help="a file written by `plan --json`")
    sub.add_argument("--steps", type=_positive, default=1, metavar="N", help="training steps to compare (1)")
    sub.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), help="compute in another dtype than the model file's")
    sub.add_argument("--as-given", action="store_true", help="no noise on parameters and inputs (it shows what ones and zeros hide)")
    sub.add_argument("--repro", metavar="DIR", help="when they differ: make the case small and write repro.py and plan.json there")

    sub = command("calibrate", run_calibrate, "measure this machine and write a profile for `--cluster`, in at most two minutes")
    sub.add_argument("--out", default="calibrated.json", metavar="FILE.json", help="the profile to write (calibrated.json)")
    sub.add_argument("--ranks", type=_positive, metavar="N", help="processes that measure at once: as many as will train (a device each)")
    sub.add_argument("--seconds", type=_seconds, default=90.0, metavar="S", help="about how long it may take (90)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="the order of measuring, and which points judge the fit (0)")

    sub = command("doctor", run_doctor, "look whether this machine can train, in about 15 seconds; exit code 1 with what to do if not")
    sub.add_argument("--ranks", type=_positive, metavar="N", help="processes of the collective test (one per GPU; 2 without)")
    sub.add_argument("--cluster", metavar="NAME", help="a preset or a profile file to compare with")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")

    sub = command("mesh", run_mesh, "show the axes and links of a mesh")
    sub.add_argument("mesh", metavar="MESH", help="axes and sizes, outermost first: dp=2,tp=4")
    sub.add_argument("--cluster", metavar="NAME", help="a preset or a profile file")

    command("clusters", run_clusters, "list the cluster presets")
    return parser


def _model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "file", metavar="FILE[:NAME]", nargs="?", help="a Python file with model() and sample_inputs(); NAME picks another factory"
    )
    sub.add_argument("--hf", metavar="CONFIG", help="instead of FILE: a Hugging Face causal language model's config.json")
    sub.add_argument("--batch", type=_positive, default=8, metavar="N", help="with --hf: global batch size (8)")
    sub.add_argument("--seq", type=_positive, default=1024, metavar="N", help="with --hf: tokens per sequence (1024)")


def _plan_options(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--mesh", metavar="MESH", help="axes and sizes, outermost first: dp=2,tp=4")
    which.add_argument("--devices", type=_positive, metavar="N", help="instead of a mesh: find the best one of so many devices")
    sub.add_argument("--cluster", metavar="NAME", help="a preset (see `clusters`) or a profile file; without it, this machine")
    sub.add_argument("--memory", metavar="SIZE", help="the most one device may hold: 70GiB; without it, what the device has")
    sub.add_argument("--optimizer", default="adamw", metavar="NAME", help="whose state is counted (adamw)")
    sub.add_argument(
        "--pin", action="append", default=[], metavar="NAME=PLACEMENTS", help="fix a parameter's placements: wte.weight=S(0),R"
    )
    sub.add_argument(
        "--forbid",
        action="append",
        default=[],
        metavar="NAME=PLACEMENTS",
        help="placements that a parameter must not have: wte.weight=S(0)",
    )
    sub.add_argument("--baseline", metavar="RECIPES", help="plan by hand-made recipes instead: fsdp+megatron-tp (see docs/baselines.md)")
    sub.add_argument("--checkpoint", action="store_true", help="with --baseline: run the ops of every repeated block again in backward")
    sub.add_argument("--compare", action="store_true", help="plan every usual baseline on the same mesh too, and show a table")
    sub.add_argument("--mode", choices=("training", "inference"), default="training", help="inference plans forward alone (training)")
    sub.add_argument("--precision", type=Precision.of, metavar="NAME", help="bf16 or fp16: parameters stay as they are, casts are added")
    sub.add_argument("--random-costs", type=int, metavar="SEED", help="draw seeded random prices: odd but legal plans, for testing")
    sub.add_argument("--micro-batches", type=int, metavar="N", help="micro-batches of a step (default: one, unless more are better)")
    sub.add_argument("--offload", action="store_true", help="activations, parameters, optimizer state may wait in host memory or on disk")
    sub.add_argument("--fuse", action=argparse.BooleanOptionalAction, default="auto", help="place fused ops (where they were timed)")
    sub.add_argument("--time-limit", type=_seconds, default=60.0, metavar="S", help="seconds for the solver (60)")
    sub.add_argument("--gap", type=_seconds, default=1e-4, metavar="G", help="stop when proven this close to the optimum (0.0001)")
    sub.add_argument("--strict", action="store_true", help="refuse operations that have no sharding rule")
    sub.add_argument("--json", metavar="PATH", help="write the plan to this file")
    sub.add_argument(
        "--no-overlap", action="store_true", help="run every collective where it is needed, and take the plan with the least sum"
    )
    sub.add_argument("--timeline", action="store_true", help="simulate the step on the lowered program, op by op, instead of sketching it")
    sub.add_argument("--trace", metavar="PATH", help="write that simulation for ui.perfetto.dev to this file (implies --timeline)")
    sub.add_argument("--all", "--verbose", dest="all", action="store_true", help="every choice, and long tables in full")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def _version() -> str:
    try:
        return metadata.version("netmind-autopar")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _load(args: argparse.Namespace, *, meta: bool) -> modelfile.Loaded:
    if bool(args.file) == bool(args.hf):
        raise InputError(
            "no model is given" if not args.file else "two models are given",
            why="a model is either FILE or --hf CONFIG",
            try_=f"netmind-autopar {args.command} --help",
        )
    if args.hf:
        return modelfile.load_hf(args.hf, args.batch, args.seq, meta=meta)
    return modelfile.load_file(args.file, meta=meta)


def _pins(texts: Sequence[str], option: str) -> dict[str, str] | None:
    """`["wte.weight=S(0),R"]` → `{"wte.weight": "S(0) R"}`."""
    pins = {}
    for text in texts:
        name, equals, placements = text.partition("=")
        if not (name and equals and placements):
            raise InputError(
                f"cannot read the pin {text!r}" if option == "--pin" else f"cannot read {option} {text!r}",
                why="it is a parameter's name, '=' and placements with commas between them" + ", one per axis" * (option == "--pin"),
                try_=f"{option} 'wte.weight=S(0),R'",
            )
        pins[name] = placements.replace(",", " ")
    return pins or None


def run_plan(args: argparse.Namespace) -> int:
    from . import api
    from .arguments import fusing, mesh_or_devices, parse_memory
    from .costs.device import make_mesh
    from .costs.timeline import save_trace
    from .ir.mesh import Mesh
    from .passes.timing import mesh_of, with_timeline
    from .rules.bind import bind_program, learnt_rules
    from .solver.baselines import compare_baselines
    from .solver.explain import class_rows
    from .tracer.capture import capture

    pins, forbid = _pins(args.pin, "--pin"), _pins(args.forbid, "--forbid")
    compared: Sequence[Any] = ()
    with _progress() as progress:
        progress("building the model")
        loaded = _load(args, meta=True)
        start = time.process_time()
        where = mesh_or_devices(args.mesh, args.devices, args.cluster)
        progress("capturing the model")
        program = capture(loaded.model, loaded.inputs, mode=args.mode, fuse=fusing(args.fuse), precision=args.precision)
        solving = {"optimizer": args.optimizer, "pins": pins, "forbid": forbid, "random_costs": args.random_costs, "inputs": "global"}
        solving |= {"time_limit": args.time_limit, "gap": args.gap}
        # as api.plan does, but the program is still needed for the report
        recipes = {"baseline": args.baseline, "checkpoint": args.checkpoint, "offload": args.offload}
        recipes |= {"micro_batches": args.micro_batches, "overlap": not args.no_overlap}
        found = api.plan_program(program, where, progress, memory=args.memory, strict=args.strict, **recipes, **solving)
        found = found.timed(time.process_time() - start)
        rules = bind_program(program)
        rows, learnt = class_rows(program, rules, found), learnt_rules(program)
        if args.compare:
            progress("planning the baselines")
            mesh = make_mesh(",".join(f"{a.name}={a.size}" for a in found.mesh), found.cluster)
            solving |= {"memory_limit": parse_memory(args.memory), "graph_hash": found.graph_hash, "cluster": found.cluster}
            solving["overlap"] = not args.no_overlap
            compared = [c.row for c in compare_baselines(program, rules, mesh, **solving)]
        if args.timeline or args.trace:
            progress("simulating the step")
            timed, steps = with_timeline(program, rules, found, where if isinstance(where, Mesh) else mesh_of(found))
            found = timed.timed(found.solve_s).beside(found.alternatives)
    if args.json:
        found.save(args.json)
    if args.trace:
        save_trace(args.trace, steps, loaded.title)
    parameters = report.parameter_rows(found, loaded.model.named_parameters())
    _show(report.plan_report(found, loaded.title, parameters, rows, learnt=learnt, compared=compared, show_all=args.all))
    return OK


def run_explain(args: argparse.Namespace) -> int:
    from .rules.bind import bind_program, learnt_rules
    from .solver.explain import class_rows, conversion_rows
    from .tracer.capture import capture

    plan = Plan.load(args.plan)
    if not (args.file or args.hf):
        _show(report.plan_report(plan, show_all=True))
        return OK
    with _progress() as progress:
        progress("building the model")
        loaded = _load(args, meta=True)
        progress("capturing the model")
        program = capture(loaded.model, loaded.inputs, mode=plan.mode, fuse=plan.fuse, precision=plan.precision)
        rules = bind_program(program)
        sent, rows = conversion_rows(program, rules, plan), class_rows(program, rules, plan)
        learnt = learnt_rules(program)
    parameters = report.parameter_rows(plan, loaded.model.named_parameters())
    _show(report.plan_report(plan, loaded.title, parameters, rows, sent, learnt=learnt, show_all=args.all))
    return OK


def _show(shown: Any) -> None:
    """Print a report; without the blanks that fill its lines when it goes to a file or a pipe."""
    out = report.console()
    if out.is_terminal:
        out.print(shown)
    else:
        sys.stdout.write(report.render(shown, out.width))


def run_diff(args: argparse.Namespace) -> int:
    a, b = Plan.load(args.a), Plan.load(args.b)
    short = Path(args.a).name, Path(args.b).name
    difference = report.diff_report(a, b, short if short[0] != short[1] else (args.a, args.b))
    _show(difference or "The plans are the same.")
    return DIFFERS if difference else OK


def run_verify(args: argparse.Namespace) -> int:
    import torch

    from .verification import AMOUNT, verify
    from .verification.show import verify_report

    plan = Plan.load(args.plan)
    with _progress() as progress:
        progress("building the model")
        loaded = _load(args, meta=False)
        if args.dtype:
            loaded, plan = modelfile.in_dtype(loaded, plan, args.dtype)
        progress(f"running {' × '.join(map(str, plan.sizes))} ranks in lockstep")
        trainer = (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)) if args.steps > 1 else None
        noise = 0.0 if args.as_given else AMOUNT
        result = verify(loaded.model, loaded.inputs, plan, steps=args.steps, optimizer=trainer, perturb=noise)
        if args.repro and result.failure:
            progress("making the failing case small")
            result = result.shrink()
    _show(verify_report(result))
    if args.repro and result.failure:
        print(result.save(args.repro))
    return OK if result.ok else DIFFERS


def run_calibrate(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from .calibrate.run import calibrate, check_writable, save
    from .calibrate.show import calibration_report

    check_writable(args.out)
    with Progress(console=report.console(sys.stderr), transient=True, disable=not sys.stderr.isatty()) as shown:
        bar = shown.add_task("starting", total=1.0)
        profile = calibrate(
            ranks=args.ranks,
            seconds=args.seconds,
            seed=args.seed,
            say=lambda what, part: shown.update(bar, description=what, completed=part),
        )
    save(profile, args.out)
    _show(calibration_report(profile, args.out))
    return OK


def run_doctor(args: argparse.Namespace) -> int:
    from .doctor import examine
    from .doctor.show import diagnosis_report, diagnosis_text

    with _progress() as progress:
        found = examine(ranks=args.ranks, cluster=args.cluster, say=progress)
    _show(diagnosis_report(found)) if not args.json else print(diagnosis_text(found))
    return OK if found.ok else DIFFERS


def run_mesh(args: argparse.Namespace) -> int:
    from .costs.device import make_mesh

    _show(report.mesh_report(make_mesh(args.mesh, args.cluster)))
    return OK


def run_clusters(args: argparse.Namespace) -> int:
    from .costs.device import cluster_profile
    from .costs.presets import CLUSTERS

    _show(report.clusters_report([cluster_profile(name) for name in CLUSTERS]))
    return OK


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A function that shows what is being done, on stderr and only when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    with report.console(sys.stderr).status("") as status:
        yield lambda *text: status.update(" ".join(map(str, text)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except AutoparError as e:
        if debug_level():
            raise
        print(e.render(), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _silence(sys.stdout)
        return BROKEN_PIPE
    except SystemExit as e:  # --help and --version
        return e.code if isinstance(e.code, int) else OK
    except Exception as e:
        if debug_level():
            raise
        text = str(e).strip().splitlines()
        print(
            f"netmind-autopar: unexpected {type(e).__name__}: {text[0] if text else ''}  (set AUTOPAR_DEBUG=1 for the traceback)",
            file=sys.stderr,
        )
        return DEFECT


def _silence(stream: Any) -> None:
    """Send what is still buffered nowhere, so that the interpreter does not complain about it when it ends."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
