"""One decision, explained: the kernel functions that it walks through, and why each was entered.

The walk is recorded while the real choosers run, so it cannot disagree with the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .fault import Access, Backing, Fault, FaultFlag, FaultKind, describe
from .handle import Level, admit, handle_mm_fault, recording, sanitize_fault_flags
from .plan import plan
from .pte import PteState
from .rows import Row
from .steps import Step

__all__ = ["Inputs", "Walk", "explain", "walk"]


class Inputs(Protocol):
    """The five inputs of a decision: a Fault has them, and so has a trace record."""

    @property
    def kind(self) -> FaultKind: ...
    @property
    def access(self) -> Access: ...
    @property
    def backing(self) -> Backing: ...
    @property
    def pte(self) -> PteState: ...
    @property
    def flags(self) -> FaultFlag: ...


@dataclass(frozen=True, slots=True)
class Walk:
    """How one decision came about, and the order of work that it asks for."""

    fault: Fault
    levels: tuple[Level, ...]
    row: Row
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        """The levels indented as calls, the row, then the steps."""
        f, r, last = self.fault, self.row, self.levels[-1]
        lines = [
            f"{f.kind.name} {f.access.name} fault, {f.backing.name} region, page {f.pte.name}, "
            f"flags {describe(f.flags)}",
            "",
        ]
        for level in self.levels:
            lines.append("  " * level.depth + f"{level.function}(): {level.because}")
        added = f", the executor may add {describe(r.may_add)}" if r.may_add else ""
        lines += [
            "  " * (last.depth + last.chooses) + f"row {r}: {r.why}",
            "",
            f"action   {r.action.name}{'' if r.executable else '  (not implemented)'}",
            f"commit   {r.commit.name}",
            f"page     {'as it is' if r.next_pte is None else r.next_pte.name}",
            f"result   {describe(r.result)}{added}",
            f"charge   {r.nr_charge} {'page' if r.nr_charge == 1 else 'pages'}",
            f"counters {' '.join(c.name for c in sorted(r.counters)) or 'none'}",
            "",
        ]
        lines += [f"{number:2}. {step.value}" for number, step in enumerate(self.steps, 1)]
        return "\n".join(lines).rstrip()


def walk(inputs: Inputs) -> Walk:
    """Decides again, watching."""
    fault = Fault(inputs.kind, inputs.access, inputs.backing, inputs.pte, inputs.flags)
    with recording() as levels:
        chosen = handle_mm_fault(fault, because=_entry(fault))
    return Walk(fault, tuple(levels), chosen, plan(chosen))


def explain(inputs: Inputs) -> tuple[str, ...]:
    """The functions of mm/memory.c that the decision walks through, in order."""
    return tuple(level.function for level in walk(inputs).levels)


def _entry(fault: Fault) -> str:
    if admit(fault.kind, fault.flags) is not None:
        return "the prologue ends it"
    bug = sanitize_fault_flags(fault)
    return bug or "the message is admitted"
