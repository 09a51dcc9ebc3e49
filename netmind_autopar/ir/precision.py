"""In which dtypes a model computes: parameters stay as the model has them, matrix products take copies of fewer bits.

"fp32"   as the model is written: no policy
"bf16"   Precision(compute="bfloat16", reduce="float32")
"fp16"   Precision(compute="float16", reduce="float32"); the loss must be scaled, see optim.GradScaler
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import InputError

NAMES: dict[str, dict[str, str] | None] = {"fp32": None, "bf16": {"compute": "bfloat16"}, "fp16": {"compute": "float16"}}
_HELP = 'precision="bf16", or {"compute": "bfloat16", "reduce": "float32", "outputs": None, "keep": ["*.router"]}'


class Precision(BaseModel):
    """A policy. It changes float32 alone: what the model keeps in float64 or in fewer bits stays so.

    compute: of matrix products, convolutions and attention. Softmax, norms, losses and sums compute in float32.
    reduce: in which gradients of parameters are summed over devices: float32, or that of compute, which halves what travels.
    outputs: the dtype of floating-point outputs; None: as they come out. keep: patterns (of fnmatch) of modules, by their
    qualified names, that compute in float32.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    compute: Literal["bfloat16", "float16"] = "bfloat16"
    reduce: Literal["float32", "bfloat16", "float16"] = "float32"
    outputs: Literal["float32", "bfloat16", "float16"] | None = None
    keep: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Precision:
        if self.reduce not in ("float32", self.compute):
            raise ValueError(f"gradients come out in {self.compute}: reduce is float32 or {self.compute}")
        return self

    @classmethod
    def of(cls, value: Any) -> Precision | None:
        """A policy from a name, a mapping or a policy; None for "fp32" and None. Raises InputError on anything else."""
        if value is None or isinstance(value, Precision):
            return value
        if isinstance(value, str):
            if value not in NAMES:
                raise InputError(f"there is no precision {value!r}", why=f"known are {', '.join(NAMES)}", try_=_HELP)
            value = NAMES[value]
            return None if value is None else cls(**value)  # type: ignore[arg-type]
        if not isinstance(value, Mapping):
            raise InputError(f"a {type(value).__name__} is no precision", why="a policy is a name or a mapping", try_=_HELP)
        given = {k: tuple(v) if k == "keep" and isinstance(v, list) else v for k, v in value.items()}
        try:
            return cls.model_validate(given)
        except (ValidationError, TypeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, ("precision", *first["loc"])))
            raise InputError("cannot read the precision", where=where, why=str(first["msg"]), try_=_HELP) from None

    @property
    def dtype(self) -> torch.dtype:
        """That of `compute`."""
        return getattr(torch, self.compute)  # type: ignore[no-any-return]

    @property
    def is_uniform(self) -> bool:
        """Whether repeated blocks are treated alike whatever their numbers: no pattern can tell them apart."""
        return not any(c.isdigit() or c in "?[" for pattern in self.keep for c in pattern)

    def keeps(self, module: str) -> bool:
        """Whether a module computes in float32."""
        return any(fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*") for pattern in self.keep)

    def __str__(self) -> str:
        """For people: `bfloat16, gradients summed in float32`."""
        more = [f"outputs in {self.outputs}"] * (self.outputs is not None) + [f"float32 in {', '.join(self.keep)}"] * bool(self.keep)
        return ", ".join([self.compute, f"gradients summed in {self.reduce}", *more])


def agreed(asked: Any, recorded: Precision | None) -> Precision | None:
    """The policy of a plan, which what was asked for must not contradict; raises InputError."""
    if asked is not None and Precision.of(asked) != recorded:
        raise InputError(
            "the plan was made for another precision",
            where=f"precision={asked!r}",
            why=f"the plan's is {recorded or 'fp32'}",
            try_="drop precision=, or plan again",
        )
    return recorded
