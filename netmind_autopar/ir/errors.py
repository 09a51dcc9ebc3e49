"""Every error a user can meet: one tree, four slots (what, where, why, try)."""

from __future__ import annotations


class AutoparError(Exception):
    """Base of all errors raised on purpose.

    what:  one line, what went wrong.
    where: the user's own line, file or field; empty when there is none.
    why:   the reason, in the user's terms.
    try_:  the smallest change that makes it work.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", try_: str = "") -> None:
        self.what, self.where, self.why, self.try_ = what, where, why, try_
        super().__init__(self.render())

    def render(self) -> str:
        """The message as shown: the class, then one line per slot that is filled."""
        lines = [f"{type(self).__name__}: {self.what}"]
        slots = (("where", self.where), ("why", self.why), ("try", self.try_))
        lines += [f"  {name:<6} {text}" for name, text in slots if text]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


class InputError(AutoparError):
    """The arguments of a call are not what the call takes."""


class MeshError(AutoparError):
    """A mesh, an axis or a cluster is unknown or does not fit."""


class ProfileError(AutoparError):
    """A device or cluster profile holds a missing or absurd number."""


class CaptureError(AutoparError):
    """The model cannot be captured as one static graph."""


class UnknownOpError(AutoparError):
    """No sharding rule for an operation, and `strict=True`."""


class RuleError(AutoparError):
    """A sharding rule given by hand is wrong, or cannot be proven."""


class PlanError(AutoparError):
    """A plan file is damaged, or belongs to another graph or mesh."""


class InfeasibleError(AutoparError):
    """No plan fits the memory limit or the pins."""


class SolverError(AutoparError):
    """The solver gave no usable answer."""


class ShapeError(AutoparError):
    """A parallel module was called with inputs unlike those it was planned for."""


class OffloadError(AutoparError):
    """A tensor cannot wait in host memory or on disk: no room, or no right to write there."""


class CheckpointError(AutoparError):
    """A checkpoint or a file of weights cannot be written or read."""


class DamagedError(CheckpointError):
    """A file of a checkpoint, or of weights, is not what was written: cut off, changed or missing."""


class RankError(AutoparError):
    """A rank of the run is in trouble, and so all of them end.

    rank: which one, -1 when that is not known. collective: what the others were in, with the model's line; empty when they were in none.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", try_: str = "", rank: int = -1, collective: str = "") -> None:
        super().__init__(what, where=where, why=why, try_=try_)
        self.rank, self.collective = rank, collective


class LostRankError(RankError):
    """A rank died, left, or does not answer."""


class StalledRankError(RankError):
    """A rank lives, but does not come to a collective in which others wait for it."""


class DivergedRankError(RankError):
    """A rank runs other collectives, or holds other values, than the others."""


class FailedRankError(RankError):
    """Another rank raised an error that nobody caught."""


class TerminatedError(RankError):
    """A rank was told to end (SIGTERM)."""


class GraphError(AutoparError):
    """An internal check failed: a pass left a graph whose specs disagree. Always a defect of this package."""


class VerifyError(AutoparError):
    """A plan does not compute what the model computes."""
