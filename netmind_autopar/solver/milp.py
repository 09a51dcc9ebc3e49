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
    relax: binary variables may take any value from 0 to 1.
    """
    if not model.cost:
        return Result(OPTIMAL, np.zeros(0), 0.0, 0.0)
    problem, variables = _to_pulp(model, relax)
    highs = not cbc and pulp.HiGHS(msg=False).available()
    if highs:
        work = {} if nodes is None else {"mip_max_nodes": nodes}
        solver = pulp.HiGHS(msg=False, threads=THREADS, timeLimit=max(time_limit, 0.1), gapRel=gap, gapAbs=0.0, random_seed=0, **work)
    else:
        solver = pulp.PULP_CBC_CMD(msg=False, threads=THREADS, timeLimit=max(time_limit, 1.0), gapRel=gap)
    try:
        problem.solve(solver)
    except KeyError:  # PuLP knows no word for HiGHS' node limit; the values are there by then
        found = highs and problem.solverModel is not None and math.isfinite(problem.solverModel.getInfo().objective_function_value)
        problem.sol_status = pulp.LpSolutionIntegerFeasible if found else pulp.LpSolutionNoSolutionFound
    except (pulp.PulpSolverError, IndexError) as e:  # IndexError: PuLP reads values that an infeasible HiGHS model does not have
        if highs and problem.solverModel is not None and str(problem.solverModel.getModelStatus()).endswith("Infeasible"):
            return Result(INFEASIBLE, None, math.inf, math.inf)
        raise SolverError("the ILP solver failed", why=str(e), try_="raise time_limit, or reinstall highspy") from None
    found = _result(problem, variables, highs, model, gap)
    return replace(found, duals=_duals(problem, len(model.rows))) if relax and found.values is not None else found


def _duals(problem: pulp.LpProblem, rows: int) -> np.ndarray:
    """How much the objective falls when a row is relaxed by one, per row; 0 for rows that do not bind."""
    found = problem.constraintsDict() if hasattr(problem, "constraintsDict") else problem.constraints
    return np.array([sum(abs(found[f"{kind}{i}"].pi or 0.0) for kind in "eul" if f"{kind}{i}" in found) for i in range(rows)])


def _to_pulp(model: Model, relax: bool = False) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
    problem = pulp.LpProblem("autopar", pulp.LpMinimize)
    kinds = (pulp.LpContinuous, pulp.LpContinuous if relax else pulp.LpBinary)
    variables = [pulp.LpVariable(f"v{i}", 0, None if not b else 1, kinds[b]) for i, b in enumerate(model.binary)]
    problem.addVariables(variables)
    problem.setObjective(pulp.LpAffineExpression([(v, c) for v, c in zip(variables, model.cost, strict=True) if c]))
    for i, (terms, low, high) in enumerate(model.rows):
        body = pulp.LpAffineExpression([(variables[j], a) for j, a in terms.items() if a])
        if low == high:
            problem.addConstraint(pulp.LpConstraint(body, pulp.LpConstraintEQ, rhs=low), f"e{i}")
            continue
        if high < math.inf:
            problem.addConstraint(pulp.LpConstraint(body, pulp.LpConstraintLE, rhs=high), f"u{i}")
        if low > -math.inf:
            problem.addConstraint(pulp.LpConstraint(body, pulp.LpConstraintGE, rhs=low), f"l{i}")
    return problem, variables


def _result(problem: pulp.LpProblem, variables: list[pulp.LpVariable], highs: bool, model: Model, gap: float) -> Result:
    if problem.sol_status == pulp.LpSolutionInfeasible:
        return Result(INFEASIBLE, None, math.inf, math.inf)
    bound = -math.inf
    info = problem.solverModel.getInfo() if highs else None
    if info is not None:
        bound = info.mip_dual_bound if problem.isMIP() else info.objective_function_value
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Result(UNKNOWN, None, math.inf, bound)
    values = np.array([v.varValue or 0.0 for v in variables])
    objective = float(np.dot(values, model.cost))
    if not highs:  # CBC through PuLP tells no bound: only what an optimal end implies
        bound = objective - gap * abs(objective) if problem.sol_status == pulp.LpSolutionOptimal else -math.inf
    return Result(OPTIMAL if problem.sol_status == pulp.LpSolutionOptimal else FEASIBLE, values, objective, min(bound, objective))


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
        return Result(INFEASIBLE if word.endswith("kInfeasible") else UNKNOWN, None, math.inf, -math.inf)

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
        if word.endswith("kInfeasible"):
            return Result(INFEASIBLE, None, math.inf, math.inf)
        if not found:
            return Result(UNKNOWN, None, math.inf, info.mip_dual_bound)
        objective = float(info.objective_function_value)
        return Result(OPTIMAL if word.endswith("kOptimal") else FEASIBLE, values, objective, min(info.mip_dual_bound, objective))
