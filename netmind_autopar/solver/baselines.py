"""The plans that people make by hand, as restrictions of the search: priced, proven and emitted by the same code as any other plan.

A recipe (recipes.py) says along one mesh axis which letters of an op may be split, by the roles that the letters play in the graph
(roles.py). What it leaves open is chosen by the solver at least cost, so that a baseline is as good as a careful hand could make it:
where a Partial sum is reduced, along which dim a parameter is stored, in which order two axes are gathered.

    batch             letters of the batch; an op without one runs whole, or lets Partial sums through
    tensor            letters of the split features; others as above
    tensor-sequence   letters of the split features, else of the sequence; others as above
    sequence-heads    heads in attention, else the sequence; between a projection and its attention either
    whole             parameters, and ops that only rearrange one, are not split, but for the features that `tensor` splits
    kept, gathered    they lie split along one dim; gathered at once and kept ("kept"), or as late as possible, and again in backward
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from ..costs.comm import Conversions
from ..costs.memory import lost, optimizer_states, room
from ..ir.errors import InfeasibleError, InputError, SolverError
from ..ir.mesh import Mesh
from ..ir.plan import ALL, Plan
from ..ir.planrows import Alternative
from ..ir.program import Program
from ..rules.algebra import LINEAR, NONE, Rule
from .build import Built
from .checkpoint import checkpointed
from .conversions import uses, value_name
from .kinds import Kind
from .overlap import Beside
from .pins import Pin, pinned
from .presolve import Kept
from .problem import Choice, evaluate
from .recipes import RECIPES, Baseline, Recipe, axis_recipes
from .roles import Roles, roles_of
from .saving.decide import Decision, Task
from .search import solve_problem
from .sketch import Sketcher
from .solve import assemble

NO_LIMIT = 1 << 62  # bytes
ATTENTION = ("autopar.attention.default", "autopar.attention_backward.default")


def solve_baseline(
    program: Program,
    rules: Mapping[str, Rule],
    mesh: Mesh,
    baseline: Baseline,
    *,
    graph_hash: str,
    cluster: str = "custom",
    memory_limit: int | None = None,
    optimizer: str = "adamw",
    pins: Mapping[str, Pin] | None = None,
    forbid: Mapping[str, Pin] | None = None,
    checkpoint: bool = False,
    tight: bool = True,
    inputs: Literal["global", "local"] = "global",
    random_costs: int | None = None,
    time_limit: float = 60.0,
    gap: float = 1e-4,
    overlap: bool = True,
) -> Plan:
    """The plan with the least sum of work that follows `baseline` and fits; options as in `solve`.

    checkpoint: every op of a repeated block runs again. tight: where the fastest plan does not fit, look for a slower one that just
    does. That takes long, and recipes leave little room for it.

    Raises InputError when the model has no place for it (no attention, too few heads, a batch that does not divide),
    InfeasibleError with the peak when it does not fit, SolverError when nothing was found in time.
    """
    start, deadline = time.process_time(), time.monotonic() + time_limit
    limit = mesh.device.memory_bytes if memory_limit is None else memory_limit
    most = room(limit, mesh.device)
    recipes, roles = axis_recipes(baseline, mesh), roles_of(program, rules)
    check_applies(roles, recipes, mesh)
    conversions = Conversions(mesh, random_costs)
    task = Task(program, rules, mesh, conversions, inputs, optimizer_states(optimizer))
    recompute = checkpointed(program, task.known[1]) if checkpoint else ()
    leasts: list[int] = []
    rounds = [
        (regather, bound) for bound in ((None, most) if tight else (None,)) for regather in _regathers(task, recipes, roles, checkpoint)
    ]
    for regather, bound in rounds:
        built = task.build(recompute, regather, limit=bound)
        allowed = _both(built, restricted(program, built, roles, recipes), pinned(program, built, mesh, pins or {}, forbid or {}))
        found = solve_problem(built.problem, allowed=allowed, time_limit=max(deadline - time.monotonic(), 1.0), gap=gap)
        if found.choice is None:
            continue
        leasts.append(evaluate(built.problem, found.choice)[1])
        if found.seconds < math.inf and leasts[-1] <= most:
            beside = _beside(built, found.choice, conversions) if overlap else None
            file = {"graph_hash": graph_hash, "cluster": cluster, "limit": limit, "optimizer": optimizer}
            file |= {"inputs": inputs, "overlap": overlap}
            made = assemble(program, Decision(built, found, recompute, regather), mesh, conversions, beside, **file)  # type: ignore[arg-type]
            return made.timed(time.process_time() - start)
    raise _unfit(baseline, mesh, leasts, limit, checkpoint)


def _unfit(baseline: Baseline, mesh: Mesh, leasts: Sequence[int], limit: int, checkpoint: bool) -> SolverError | InfeasibleError:
    leasts = [need + lost(need, mesh.device) for need in leasts]
    if not leasts:
        return SolverError(f"no plan was found for the baseline {baseline!r} in time", try_="raise time_limit")
    return InfeasibleError(
        f"the baseline {baseline!r} does not fit: {min(leasts)} bytes per device are needed, {limit} are there",
        where=f"baseline={baseline!r} on {mesh}",
        why="what a recipe fixes cannot be changed to save memory",
        try_="checkpoint=True, " * (not checkpoint) + "another recipe, more devices, a smaller batch, or a plan without baseline=",
    )


def _beside(built: Built, choice: Choice, conversions: Conversions) -> Beside | None:
    """The timeline of a choice; none where prices mean nothing."""
    return None if conversions.random_costs is not None else Beside(choice, Sketcher(built, conversions).sketch(choice))


@dataclass(frozen=True)
class Compared:
    """One baseline on one mesh: a row for a table, and its plan, also when that does not fit."""

    row: Alternative
    plan: Plan | None = None


def usual(mesh: Mesh) -> tuple[str, ...]:
    """The baselines that people would try on a mesh: every recipe alone, and with several axes the products with data parallelism."""
    if sum(axis.size > 1 for axis in mesh.axes) < 2:
        return tuple(RECIPES)
    data = [name for name, recipe in RECIPES.items() if recipe.work == "batch"]
    model = [name for name, recipe in RECIPES.items() if recipe.work != "batch"]
    return (*data, "ddp+fsdp", *(f"{a}+{b}" for a in data for b in model))


def compare_baselines(
    program: Program, rules: Mapping[str, Rule], mesh: Mesh, names: Sequence[str] | None = None, **options: Any
) -> tuple[Compared, ...]:
    """Plans of the named baselines (of all `usual` ones when None), in that order. Options as in `solve_baseline`."""
    return tuple(_compared(program, rules, mesh, name, options) for name in (usual(mesh) if names is None else names))


def _compared(program: Program, rules: Mapping[str, Rule], mesh: Mesh, name: str, options: Mapping[str, Any]) -> Compared:
    """One row. What does not fit is checkpointed, as people would do it; what then does not either is planned without a limit."""
    tries: tuple[tuple[Literal["planned", "does not fit"], str, dict[str, Any]], ...] = (
        ("planned", name, {"tight": False}),
        ("planned", f"{name}, checkpointed", {"checkpoint": True, "tight": False}),
        ("does not fit", name, {"memory_limit": NO_LIMIT}),
    )
    why = ""
    for status, shown, more in tries:
        try:
            plan = solve_baseline(program, rules, mesh, name, **{**options, **more})
        except InfeasibleError:
            continue
        except InputError as e:
            if more.get("checkpoint"):
                continue
            return Compared(Alternative(name=name, status="no place", why=e.why or e.what))
        except SolverError as e:
            why = e.what
            break
        cost = plan.cost
        step = {"step_s": cost.step_s, "timeline_s": cost.timeline_s, "bound_s": plan.bound_s, "peak_bytes": cost.peak_bytes}
        row = Alternative(name=shown, status=status, **step)  # type: ignore[arg-type]
        return Compared(row, plan)
    return Compared(Alternative(name=name, status="not planned", why=why))


def _both(built: Built, allowed: Kept, fixed: Kept | None) -> Kept:
    """What the baseline and the user's pins leave. Raises InputError when they contradict each other."""
    if fixed is None:
        return allowed
    out = tuple(tuple(k for k in ks if k in pin) for ks, pin in zip(allowed, fixed, strict=True))
    for kind, ks in zip(built.kinds, out, strict=True):
        if not ks:
            raise InputError(f"the pins and the baseline disagree about {kind.name!r}", where="pins=, forbid=", try_="drop one of them")
    return out


def check_applies(roles: Roles, recipes: Sequence[Recipe], mesh: Mesh) -> None:
    """Raises InputError when a recipe has no place in the model, or a size does not divide over the axes that split it."""
    groups: dict[str, list[str]] = {}
    widths: dict[str, int] = {}
    for recipe, axis in zip(recipes, mesh.axes, strict=True):
        what: str = "tensor" if recipe.work.startswith("tensor") else recipe.work
        groups.setdefault(what, []).append(recipe.name)
        widths[what] = widths.get(what, 1) * axis.size
    for what, names in groups.items():
        name, n = names[0], widths[what]
        if n == 1:
            continue
        if what == "batch":
            _divides(name, "the batch", roles.batch_size, n, mesh)
        if what == "tensor":
            if not roles.pairs:
                raise _no_place(name, "no weight makes a feature dim that another weight sums over", "another recipe", mesh)
            for c in sorted(roles.pairs):
                _divides(name, "attention heads" if c in roles.heads else "a hidden dim", roles.sizes[c], n, mesh)
        if what == "sequence-heads":
            if not roles.heads:
                raise _no_place(name, "the model has no attention", "another recipe", mesh)
            _divides(name, "attention heads", min(roles.sizes[c] for c in roles.heads), n, mesh)
        if what == "sequence-heads" or "megatron-tp-sp" in names:
            longest = max((roles.sizes[c] for c in roles.sequence), default=0)
            if longest < n:
                why = f"a sequence of {longest} is shorter than {n} devices" if longest else "the model has no sequence"
                raise _no_place(name, why, "another recipe", mesh)


def _divides(name: str, what: str, size: int, n: int, mesh: Mesh) -> None:
    if size % n:
        common = math.gcd(size, n)
        raise _no_place(
            name, f"{what} of {size} over {n} devices does not divide", f"an axis of {common}" if common > 1 else "another recipe", mesh
        )


def _no_place(name: str, why: str, try_: str, mesh: Mesh) -> InputError:
    return InputError(f"the baseline {name!r} has no place here", where=f"this model on the mesh {mesh}", why=why, try_=try_)


def restricted(program: Program, built: Built, roles: Roles, recipes: Sequence[Recipe]) -> Kept:
    """Per node of the problem the strategies that follow the recipes on as many axes as its sizes permit, and split nothing on others.

    built: the problem of `program`, or of what it becomes when ops run again; these do as their originals.
    """
    reader = _Reader({node.name: node for node in program.graph.nodes}, roles)
    out = []
    for kind in built.kinds:
        member = kind.members[0] if kind.members else ""
        name = built.nodes[member].meta.get("again", member) if member else ""
        wanted = [reader.symbols(kind, name, recipe) for recipe in recipes]
        scores = [_score(strategy, wanted) for strategy in kind.strategies]
        out.append(tuple(k for k, score in enumerate(scores) if score == max(scores)))
    return tuple(out)


def _score(strategy: Sequence[str], wanted: Sequence[frozenset[str]]) -> int:
    """On how many axes a strategy does as wanted; -1 when it does something else on one."""
    follows = [symbol in symbols for symbol, symbols in zip(strategy, wanted, strict=True)]
    return sum(follows) if all(ok or symbol == NONE for ok, symbol in zip(follows, strategy, strict=True)) else -1


@dataclass(frozen=True)
class _Reader:
    """What recipes say about classes of ops, parameters and ends; `name` is a node of the program that stands for its class."""

    nodes: Mapping[str, fx.Node]
    roles: Roles

    def symbols(self, kind: Kind, name: str, recipe: Recipe) -> frozenset[str]:
        """The symbols that a recipe wants along its axis."""
        letters, rule = frozenset(kind.rule.letters), kind.rule
        flows = frozenset(rule.symbols) - letters  # with NONE
        if kind.role == "param":
            return self._parameter(kind, name, recipe)
        if kind.role != "op":
            return frozenset(rule.symbols)
        if name in self.roles.carried:
            return self._carried(name, letters, recipe)
        found = self._worked(kind, name, recipe, flows)
        if found & letters or recipe.store == "whole" or self.nodes[name].meta["phase"] == "forward":
            return (found & letters) | (found & flows) or flows
        return frozenset(rule.symbols)  # what becomes of gradients once they are made

    def _worked(self, kind: Kind, name: str, recipe: Recipe, flows: frozenset[str]) -> frozenset[str]:
        """The symbols that an op on activations may have."""
        roles = self.roles
        if recipe.work == "batch":
            return self._of(name, roles.batch) or flows
        sequence = self._of(name, roles.sequence)
        if recipe.work == "sequence-heads":
            heads = self._of(name, roles.heads)
            if str(self.nodes[name].target) in ATTENTION:
                return heads
            return (sequence | heads if self._between(kind, name, sequence) else sequence) or flows
        split, flows = self._of(name, roles.split), self._calm(kind, name, flows)
        if split or recipe.work == "tensor" or not sequence:
            return split or flows
        gathers = LINEAR in kind.rule.symbols or not self._of(name, roles.stream)  # a view of what is gathered, or a number per token
        return sequence | (flows if gathers else flows - {NONE})

    def _calm(self, kind: Kind, name: str, flows: frozenset[str]) -> frozenset[str]:
        """Partial sums go through ops of one tensor, and gradients are added up before they are reduced; no further.

        So a block's result is reduced before it meets the residual stream, and the stream's gradient before a norm's backward.
        """
        tensors = sum(bool(term.dims) for term in kind.rule.inputs)
        if tensors == 1 or (self.nodes[name].meta["phase"] == "backward" and LINEAR in flows):
            return flows
        return frozenset((NONE,))

    def _of(self, name: str, components: frozenset[int]) -> frozenset[str]:
        return frozenset(self.roles.of(name, components))

    def _between(self, kind: Kind, name: str, sequence: frozenset[str]) -> bool:
        """True when an op keeps the sequence and takes no weight: what stands between a projection and its attention."""
        kept = all(t is None or any(x in dim for dim in t.dims for x in sequence) for t in kind.rule.outputs)
        return kept and not any(arg.name in self.roles.carried for arg in self.nodes[name].all_input_nodes)

    def _carried(self, name: str, letters: frozenset[str], recipe: Recipe) -> frozenset[str]:
        """What is made of a parameter before it is used: gathered here only if the other phase does not need it."""
        whole = frozenset((NONE,))
        if recipe.work.startswith("tensor"):
            return self._of(name, self.roles.split) & letters or whole
        if recipe.store != "gathered" or not letters:
            return whole
        phases = {user.meta.get("phase") for user in self.nodes[name].users}
        return letters if len(phases) > 1 else letters | whole

    def _parameter(self, kind: Kind, name: str, recipe: Recipe) -> frozenset[str]:
        """Where it is stored. Features that are parts of a dim, as heads of a joint projection, may also lie whole: moving them costs."""
        letters, whole = frozenset(kind.rule.letters), frozenset((NONE,))
        if recipe.store != "whole":
            return letters or whole
        if not recipe.work.startswith("tensor"):
            return whole
        dims = self.roles.dims[name]
        found = {f"d{d}" for d, components in enumerate(dims) if self.roles.split.intersection(components)} & letters
        parts = any(components and components[0] not in self.roles.split for d, components in enumerate(dims) if f"d{d}" in found)
        return frozenset(found) | (whole if parts or not found else frozenset())


def _regathers(task: Task, recipes: Sequence[Recipe], roles: Roles, checkpoint: bool) -> list[tuple[str, ...]]:
    """Which values are converted again in backward: parameters where the recipe says so; everything, when memory asks for it."""
    first: tuple[str, ...] = ()
    if any(recipe.store == "gathered" for recipe in recipes):
        names, phases = task.known[1], {"forward", "backward"}
        taken = {name: {u.phase for u in takers if u.result is None} for (name, _), takers in uses(task.program).items()}
        again = [n.name for n in task.program.graph.nodes if n.name in roles.carried and (checkpoint or taken[n.name] >= phases)]
        first = tuple(dict.fromkeys(value_name(names[name], 0) for name in again))
    return [first] if any(recipe.store == "kept" for recipe in recipes) else [first, (ALL,)]
