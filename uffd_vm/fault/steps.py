"""The steps that serving a fault is made of; plan.py puts them in order."""

from __future__ import annotations

import enum

__all__ = ["SLEEPS", "USES_REGION", "Step"]


class Step(enum.Enum):
    """One step. In brackets: the kernel's."""

    LOOK_UP_REGION = "look up the region, take its generation"  # lock_vma_under_rcu()
    READ_PTE = "read the page's state and version, no lock"  # vmf->orig_pte
    ENTER_SCOPE = "enter the budget's user-fault scope"  # mem_cgroup_enter_user_fault()
    PREALLOC = "get buffer and in-flight slot"  # pte_alloc_one()
    CHARGE = "charge the budget"  # mem_cgroup_charge()
    LOCK_FOLIO = "claim the folio"  # folio_lock()
    PUT_REGION = "let go of the region"  # release_fault_lock()
    WAIT = "wait for the handler that owns the page"  # migration_entry_wait()
    READ = "read the content"  # vm_ops->fault()
    HOOK = "ask page_mkwrite"  # vm_ops->page_mkwrite()
    FILL = "complete the contents"  # __folio_mark_uptodate()
    STORE = "store the page for the snapshots"  # copy_mc_user_highpage()
    MARK_DIRTY = "log the page dirty"  # folio_mark_dirty()
    SCAN = "ask the kernel"  # PAGEMAP_SCAN
    PTE_LOCK = "take the page-table lock"
    RECHECK = "compare generation, version and state"  # vmf_pte_changed()
    COMMIT = "the ioctl"  # set_pte_at()
    PUBLISH = "publish the next state"
    PTE_UNLOCK = "release the page-table lock"
    UNLOCK_FOLIO = "release the folio"
    WAKE = "wake the waiters"
    EXIT_REGION = "the region object is not ours any more"  # vma_end_read()
    ACCOUNT = "account the fault, by ids"  # mm_account_fault()
    LEAVE_SCOPE = "leave the budget's scope"  # mem_cgroup_exit_user_fault()


#: Steps that may take long: no lock of ours is held meanwhile, nor the region.
SLEEPS = frozenset({Step.WAIT, Step.READ, Step.HOOK, Step.STORE})
#: Steps that look at the region object.
USES_REGION = frozenset(
    {Step.READ_PTE, Step.PREALLOC, Step.CHARGE, Step.LOCK_FOLIO, Step.RECHECK, Step.COMMIT}
)
