"""The only folder that imports private modules of torch. Written for 2.11 to 2.13; each name says why it is needed."""

from __future__ import annotations

from .backends import inductor, inductor_lacks, peak_of
from .fakes import (
    DATA_DEPENDENT,
    Kin,
    as_in_export,
    constant,
    data_dependent_cause,
    fake_mode,
    is_fake,
    is_plain,
    is_symbolic,
    is_transforming,
    no_modes,
    nodes_made,
    number_of,
    quiet,
    recorder,
    saving_hooks,
    unseen,
)
from .traces import attribute, export, joint, new_node, traced, traced_backward, traced_call, traced_node

__all__ = [
    "DATA_DEPENDENT",
    "Kin",
    "as_in_export",
    "attribute",
    "constant",
    "data_dependent_cause",
    "export",
    "fake_mode",
    "inductor",
    "inductor_lacks",
    "is_fake",
    "is_plain",
    "is_symbolic",
    "is_transforming",
    "joint",
    "new_node",
    "no_modes",
    "nodes_made",
    "number_of",
    "peak_of",
    "quiet",
    "recorder",
    "saving_hooks",
    "traced",
    "traced_backward",
    "traced_call",
    "traced_node",
    "unseen",
]
