"""Linear programs with whole-number variables, through PuLP. The only importer of pulp.

Two traps that this file exists for: PuLP's `status` says "Optimal" after a time limit (`sol_status` tells the truth), and
HiGHS returns nothing when `threads` changes within a process, so it is always 1, which also makes runs repeatable.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pulp

from ..ir.errors import SolverError

THREADS = 1
OPTIMAL, FEASIBLE, INFEASIBLE, UNKNOWN = "optimal", "feasible", "infeasible", "unknown"


@dataclass
class Model:
    """Minimise cost · v with `low <= row · v <= high` and `0 <= v`. Binary variables are also at most 1."""

    cost: list[float] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def var(self, cost: float = 0.0, binary: bool = False) -> int:
        self.cost.append(cost)
        self.binary.append(binary)
        return len(self.cost) - 1

    def row(self, terms: Mapping[int, float], low: float, high: float) -> None:
        self.rows.append((dict(terms), low, high))


@dataclass(frozen=True)
class Result:
    """`values` is None when no solution was found. `bound` is proven: no solution costs less. `duals`: per row, of a relaxed model."""

    status: str
    values: np.ndarray | None
    objective: float
    bound: float
    duals: np.ndarray | None = None


def solver_name() -> str:
    """Which solver `solve` uses, with the versions of both layers."""
    name = "HiGHS" if pulp.HiGHS(msg=False).available() else "CBC"
    version = importlib.metadata.version("highspy") if name == "HiGHS" else ""
    return f"{name} {version}".strip() + f" (PuLP {importlib.metadata.version('PuLP')})"


def solve(model: Model, *, time_limit: float, gap: float, cbc: bool = False, relax: bool = False, nodes: int | None = None) -> Result:
    """Solve to a relative `gap` within `time_limit` seconds. CBC is used when HiGHS is missing or `cbc` is set.

    nodes: branch at most this often (HiGHS); unlike a time limit it cuts at the same place on every machine.
    relax: binary variables may take any value from 0 to 1; duals: how much the objective falls when a row is relaxed by one.
    """
    if not model.cost:
        return Result(OPTIMAL, np.zeros(0), 0.0, 0.0)
    if cbc or not pulp.HiGHS(msg=False).available():
        return _by_cbc(model, time_limit, gap, relax)
    binary = np.array(model.binary, bool)
    live = Live(np.array(model.cost), np.where(binary, 1.0, math.inf))
    terms = [(j, a) for row, _, _ in model.rows for j, a in row.items() if a]
    start = np.cumsum([0, *(sum(map(bool, row.values())) for row, _, _ in model.rows)])
    low, high = (np.array([row[side] for row in model.rows], np.float64) for side in (1, 2))
    live.rows(start, np.array([j for j, _ in terms], np.int32), np.array([a for _, a in terms], np.float64), low, high)
    if relax or not binary.any():
        found = live.relax(time_limit)
        return found if found.duals is None else replace(found, duals=np.abs(found.duals))
    return live.whole(np.flatnonzero(binary), time_limit=time_limit, gap=gap, nodes=nodes)


def _by_cbc(model: Model, time_limit: float, gap: float, relax: bool) -> Result:
    """Through PuLP's own model, which every one of its solvers takes. CBC through PuLP tells no bound: only what an optimal end implies."""
    problem, variables, rows = _to_pulp(model, relax)
    try:
        problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=THREADS, timeLimit=max(time_limit, 1.0), gapRel=gap))
    except pulp.PulpSolverError as e:
        raise SolverError("the ILP solver failed", why=str(e), try_="raise time_limit, or install highspy") from None
    if pulp.LpStatusInfeasible in (problem.status, problem.sol_status):
        return Result(INFEASIBLE, None, math.inf, math.inf)
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Result(UNKNOWN, None, math.inf, -math.inf)
    values = np.array([v.varValue or 0.0 for v in variables])
    objective = float(np.dot(values, model.cost))
    done = problem.sol_status == pulp.LpSolutionOptimal
    duals = np.array([sum(abs(side.pi or 0.0) for side in row) for row in rows]) if relax else None
    return Result(OPTIMAL if done else FEASIBLE, values, objective, objective - gap * abs(objective) if done else -math.inf, duals)


def _to_pulp(model: Model, relax: bool) -> tuple[pulp.LpProblem, list[pulp.LpVariable], list[list[pulp.LpConstraint]]]:
    """The problem, its variables, and per row of the model what holds its two sides (one where they are equal)."""
    problem = pulp.LpProblem("autopar", pulp.LpMinimize)
    kinds = (pulp.LpContinuous, pulp.LpContinuous if relax else pulp.LpBinary)
    variables = [pulp.LpVariable(f"v{i}", 0, None if not b else 1, kinds[b]) for i, b in enumerate(model.binary)]
    problem.addVariables(variables)
    problem.setObjective(pulp.LpAffineExpression([(v, c) for v, c in zip(variables, model.cost, strict=True) if c]))
    rows: list[list[pulp.LpConstraint]] = []
    for i, (terms, low, high) in enumerate(model.rows):
        body = pulp.LpAffineExpression([(variables[j], a) for j, a in terms.items() if a])
        sides = ((low, pulp.LpConstraintGE, "l"), (high, pulp.LpConstraintLE, "u")) if low != high else ((low, pulp.LpConstraintEQ, "e"),)
        rows.append([])
        for end, sense, kind in sides:
            if abs(end) < math.inf:
                rows[-1].append(pulp.LpConstraint(body, sense, rhs=end))
                problem.addConstraint(rows[-1][-1], f"{kind}{i}")
    return problem, variables, rows


class Live:
    """A linear program that stays with HiGHS while rows are added and bounds change: arrays in, arrays out; configured by PuLP.

    Minimise offset + cost · v with low <= row · v <= high and 0 <= v <= upper. Raises SolverError where HiGHS is not installed.
    """

    def __init__(self, cost: np.ndarray, upper: np.ndarray, offset: float = 0.0) -> None:
        problem = pulp.LpProblem("autopar", pulp.LpMinimize)
        try:
            pulp.HiGHS(msg=False, threads=THREADS, random_seed=0).createAndConfigureSolver(problem)
        except (pulp.PulpSolverError, AttributeError) as e:
            raise SolverError("HiGHS is not installed", why=str(e), try_='pip install "highspy"') from None
        self.highs = problem.solverModel
        self.columns, self.height = len(cost), 0
        none = np.zeros(0, np.int32)
        zeros = np.zeros(len(cost), np.int32)
        self.highs.addCols(
            len(cost), np.asarray(cost, np.float64), np.zeros(len(cost)), upper.astype(np.float64), 0, zeros, none, np.zeros(0)
        )
        self.highs.changeObjectiveOffset(offset)

    def rows(self, start: np.ndarray, index: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Row r has the entries start[r] … start[r + 1] of index and value (start[-1] is the number of entries)."""
        bounds = (np.maximum(low, -self.highs.inf), np.minimum(high, self.highs.inf))
        first = np.asarray(start[:-1], np.int32)
        self.highs.addRows(len(low), *bounds, len(index), first, np.asarray(index, np.int32), np.asarray(value, np.float64))
        self.height += len(low)

    def limit_row(self, row: int, high: float) -> None:
        """Another upper end of one row."""
        self.highs.changeRowBounds(row, -self.highs.inf, high)

    def limit_columns(self, columns: np.ndarray, upper: float) -> None:
        n = len(columns)
        if n:
            self.highs.changeColsBounds(n, np.asarray(columns, np.int32), np.zeros(n), np.full(n, upper))

    def price(self, column: int, cost: float) -> None:
        self.highs.changeColCost(column, cost)

    def relax(self, time_limit: float) -> Result:
        """The optimum with all columns continuous; duals per row with HiGHS' sign (at most 0 where the upper end binds)."""
        self.highs.setOptionValue("time_limit", self.highs.getRunTime() + max(time_limit, 0.1))
        self.highs.run()
        found, word = self.highs.getSolution(), str(self.highs.getModelStatus())
        if word.endswith("kOptimal"):
            objective = self.highs.getInfo().objective_function_value
            return Result(OPTIMAL, np.array(found.col_value), objective, objective, np.array(found.row_dual))
        return Result(INFEASIBLE, None, math.inf, math.inf) if _infeasible(word) else Result(UNKNOWN, None, math.inf, -math.inf)

    def whole(
        self, columns: np.ndarray, *, time_limit: float, gap: float, nodes: int | None = None, first: np.ndarray | None = None
    ) -> Result:
        """The optimum with `columns` whole, to a relative `gap` of the objective with its offset. first: values of `columns` to start from.

        Afterwards all columns are continuous again.
        """
        n, columns = len(columns), np.asarray(columns, np.int32)
        options = {"time_limit": self.highs.getRunTime() + max(time_limit, 0.1), "mip_rel_gap": gap, "mip_abs_gap": 0.0}
        for name, value in options.items():
            self.highs.setOptionValue(name, value)
        self.highs.setOptionValue("mip_max_nodes", 2**31 - 1 if nodes is None else nodes)
        self.highs.changeColsIntegrality(n, columns, np.ones(n, np.uint8))
        if first is not None:
            self.highs.setSolution(n, columns, np.asarray(first, np.float64))
        self.highs.run()
        info, word = self.highs.getInfo(), str(self.highs.getModelStatus())
        values = np.array(self.highs.getSolution().col_value)
        found = info.primal_solution_status == 2 and len(values) == self.columns
        self.highs.changeColsIntegrality(n, columns, np.zeros(n, np.uint8))
        if _infeasible(word):
            return Result(INFEASIBLE, None, math.inf, math.inf)
        if not found:
            return Result(UNKNOWN, None, math.inf, info.mip_dual_bound)
        objective = float(info.objective_function_value)
        return Result(OPTIMAL if word.endswith("kOptimal") else FEASIBLE, values, objective, min(info.mip_dual_bound, objective))


def _infeasible(word: str) -> bool:
    """What HiGHS' status says; what cannot run is a SolverError. No model here is unbounded: costs and variables are at least 0."""
    if word.endswith("Error"):
        raise SolverError("the ILP solver failed", why=f"HiGHS: {word}", try_="report it with the model that was planned")
    return word.endswith("Infeasible")
