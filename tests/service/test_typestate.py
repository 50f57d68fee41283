"""The tokens of the Python fault service: what they refuse, at run time and under mypy; and the races
that they are there for: the entry that changed, the region that went."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.fault_world import SECOND_NS, START, World
from uffd_vm.errors import StaleRegionError
from uffd_vm.fault.action import Counter, Settlement
from uffd_vm.fault.fault import FaultFlag, FaultResult
from uffd_vm.fault.pte import FolioState, PteState
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SIZE
from uffd_vm.service.fault_service import memory, policy
from uffd_vm.service.fault_service import mm as mm_module
from uffd_vm.service.fault_service.completion import run_task
from uffd_vm.service.fault_service.filemap import PageCache
from uffd_vm.service.fault_service.memory import (
    VmFault,
    do_swap_page,
    finish_fault,
    handle_mm_fault,
)
from uffd_vm.service.fault_service.typestate import (
    Seal,
    TypestateError,
    VmaLocked,
    install,
    lock_folio,
    lock_pte,
    lock_vma,
    pte_same,
    pte_unmap_same,
    walk,
)

ROOT = Path(__file__).resolve().parents[2]
MISSING, READ, WRITE = 0, 0, 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(monkeypatch)
    yield world
    world.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(b"".join(bytes([n + 1]) * PAGE_SIZE for n in range(7)) + b"tail")
    return file


def vm_fault(world: World, index: int = 0) -> VmFault[Any]:
    (region,) = world.mm.space
    return VmFault(region, START + index * PAGE_SIZE, MISSING, READ, tid=1)


# --- at run time -------------------------------------------------------------------------------------


def test_forged_token_is_refused(world: World) -> None:
    region = world.anon()
    with pytest.raises(TypestateError, match="made only by its guard"):
        VmaLocked(object(), region, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(TypestateError):
        Seal(None)  # type: ignore[arg-type]


def test_expired_token_is_refused(world: World) -> None:
    world.anon()
    with lock_vma(world.mm.space, vm_fault(world)) as vma:
        with walk(vma, MISSING) as walked:
            with lock_pte(walked) as pte:
                assert pte_same(pte, walked)
            with pytest.raises(TypestateError, match="PteLocked of page 0 outlived its guard"):
                pte_same(pte, walked)
        with pytest.raises(TypestateError, match="Walked"):
            lock_pte(walked).__enter__()
    with pytest.raises(TypestateError, match="VmaLocked"):
        walk(vma, MISSING).__enter__()


def test_token_of_another_page_is_refused(world: World) -> None:
    world.anon()
    here, there = vm_fault(world, 0), vm_fault(world, 1)
    with lock_vma(world.mm.space, here) as a, lock_vma(world.mm.space, there) as b:
        with walk(a, MISSING) as walked, walk(b, MISSING) as other:
            with lock_folio(other, world.mm.zero_folio) as folio:
                with pytest.raises(TypestateError, match="of page 0, FolioLocked of page 1"):
                    finish_fault(world.mm, here, walked, folio)
            with lock_pte(walked) as pte, pytest.raises(TypestateError, match="page 0"):
                pte_same(pte, other)
            with lock_pte(walked) as pte, pytest.raises(TypestateError, match="not in what"):
                install(pte, 1, 2, world.mm.wake_region)
    assert world.fake.calls == []


def test_page_lock_does_not_nest(world: World) -> None:
    world.anon()
    with lock_vma(world.mm.space, vm_fault(world)) as vma, walk(vma, MISSING) as walked:
        with lock_pte(walked), pytest.raises(TypestateError, match="does not nest"):
            lock_pte(walked).__enter__()
        with lock_pte(walked):  # free again
            pass


def test_folio_that_does_not_hold_the_page_is_refused(world: World, path: Path) -> None:
    region = world.file(path)
    assert region.cache is not None
    read = region.cache.start_read(0, 1)
    with lock_vma(world.mm.space, vm_fault(world, 1)) as vma, walk(vma, MISSING) as walked:
        with pytest.raises(TypestateError, match="does not hold page 1"):
            lock_folio(walked, read).__enter__()


def test_tokens_are_given_back_when_the_fault_fails(world: World) -> None:
    region = world.anon()
    with pytest.raises(ZeroDivisionError):
        with lock_vma(world.mm.space, vm_fault(world)) as vma, walk(vma, MISSING) as walked:
            with lock_pte(walked):
                raise ZeroDivisionError
    assert region.readers == 0 and not region.locked


# --- the races ---------------------------------------------------------------------------------------


def test_pte_that_changed_between_walk_and_lock_is_nopage_and_frees_the_buffer(
    world: World, path: Path
) -> None:
    def faster(offset: int, nr_bytes: int) -> str:
        """Somebody maps the page while the hook is asked: between walk and lock."""
        region.set_ptes(offset // PAGE_SIZE, 1, PteState.PRESENT)
        region.set_ptes(offset // PAGE_SIZE, 1, PteState.NONE)  # same byte: the version tells
        return "ok"

    region = world.file(path, flags=FaultFlag.TRACKED, hook=faster)
    world.fault(2, access=WRITE)
    assert world.complete_io() == 1
    retry, raced = world.trace()
    assert retry.result == FaultResult.RETRY
    assert raced.result == FaultResult.NOPAGE and raced.settlement == Settlement.DROP
    assert world.fake.names() == ["wake"]  # thrown away, never an error
    assert world.counter(Counter.race_lost) == 1
    assert region.cache is not None and region.cache.reads == {}
    assert region.cache.state(2) == FolioState.ABSENT
    assert region.cache.room_for(region.cache.nr_pages)  # uncharged
    # The thread runs its instruction again, and now nobody is faster.
    region.page_mkwrite = None
    world.fault(2, access=WRITE)
    world.complete_io()
    assert region.ptes[2] == PteState.PRESENT


def test_entry_that_changed_before_do_swap_page_is_nopage(world: World) -> None:
    region = world.anon()
    region.set_ptes(0, 1, PteState.POISONED)
    vmf = vm_fault(world)
    with lock_vma(world.mm.space, vmf) as vma, walk(vma, MISSING) as walked:
        assert pte_unmap_same(walked)
        region.set_ptes(0, 1, PteState.NONE)  # the janitor has lifted the poison
        assert not pte_unmap_same(walked)
        vmf.row = policy.row_id("31")
        assert do_swap_page(world.mm, vmf, walked) == FaultResult.NOPAGE
    assert world.fake.names() == ["wake"] and world.agent.failures == []
    assert world.counter(Counter.race_lost) == 1
    with pytest.raises(TypestateError, match="Walked of page 0 outlived its guard"):
        pte_unmap_same(walked)


def test_region_dropped_during_retry_is_stale_and_wakes(world: World, path: Path) -> None:
    region = world.file(path)
    vmf = vm_fault(world, 3)
    assert handle_mm_fault(world.mm, vmf) == FaultResult.RETRY
    assert world.mm.nr_parked == 1
    world.mm.detach(region)
    assert world.mm.nr_parked == 0
    assert world.fake.calls == [("wake", START + 3 * PAGE_SIZE, PAGE_SIZE, 0)]
    with pytest.raises(StaleRegionError):
        lock_vma(world.mm.space, vmf).__enter__()
    world.complete_io()  # the read comes back to nobody
    assert world.fake.names() == ["wake"]
    assert region.cache is not None and region.cache.reads == {}


def test_handle_of_a_region_mapped_anew_is_stale(world: World) -> None:
    region = world.anon()
    vmf = vm_fault(world)
    world.mm.detach(region)
    again = world.anon()
    again.generation = region.generation
    assert handle_mm_fault(world.mm, vmf) == FaultResult.NOPAGE
    assert again.ptes[0] == PteState.NONE


def test_table_is_written_before_a_private_page_comes(world: World) -> None:
    """A child forked in between finds the page by it."""
    region = world.anon(flags=FaultFlag.TRACKED)
    written: list[set[int]] = []
    for name in ("zeropage", "copy"):
        world.fake.before(name, lambda: written.append(set(region.announced)))
    world.fault(3)
    assert written == [{0}]


def lose(cache: PageCache, *folios: int) -> None:
    """Reclaim takes them."""
    for folio in folios:
        cache.nr_reclaimed += cache.evict_clean(folio, 1)
    for folio in folios:
        assert cache.absent(folio)


def test_pages_that_an_instruction_needs_are_kept_for_its_thread(world: World, path: Path) -> None:
    """Threads that take each other's pages away all the time: one at a time gets on."""
    region = world.file(path)
    cache = region.cache
    assert cache is not None
    region.fault_around_pages = 1

    def touch(index: int) -> None:
        world.fake.pages.clear()
        world.fault(index)
        world.complete_io()

    for _ in range(20):
        for index in (1, 5):
            touch(index)
            lose(cache, index)
    touch(1)
    touch(5)
    for index in (0, 2, 3, 4, 6, 7):  # by other threads
        world.fault(index, tid=2)
        world.complete_io()
    cache.shrink(8, last_resort=True)
    assert [n for n in range(8) if not cache.absent(n)] == [1, 5]
    cache._token_until_ns = 0  # it has got on, and faults here no more
    cache.shrink(8, last_resort=True)
    assert all(cache.absent(n) for n in range(8))


@pytest.mark.parametrize("pages", [(1,), (1, 5), (0, 1, 5, 6)])
def test_instruction_that_never_has_all_its_pages_has_a_deadline(
    world: World, path: Path, pages: tuple[int, ...]
) -> None:
    region = world.file(path)
    assert region.cache is not None
    region.fault_around_pages, region.deadline_ns = 1, SECOND_NS // 5
    end = time.monotonic_ns() + SECOND_NS
    while not world.agent.failures and time.monotonic_ns() < end:
        for index in pages:
            world.fake.pages.clear()
            world.fault(index)
            world.complete_io()
            if not region.cache.absent(index):
                lose(region.cache, index)
    [(_, index, kind, err)] = world.agent.failures[:1]
    assert index in pages and kind == lib.UVM_FAILURE_TIMEOUT and err == errno.ETIMEDOUT
    assert time.monotonic_ns() - end + SECOND_NS >= region.deadline_ns


@pytest.mark.parametrize("what", ["more pages", "by request", "seldom"])
def test_thread_that_gets_on_has_no_deadline_in_common(
    world: World, path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = world.file(path)
    assert region.cache is not None
    region.fault_around_pages, region.deadline_ns = 1, SECOND_NS // 50
    if what == "seldom":
        monkeypatch.setattr(mm_module, "_CHAIN_GAP_NS", 0)
    for _ in range(60):
        for index in range(5 if what == "more pages" else 2):
            world.fake.pages.clear()
            world.fault(index)
            world.complete_io()
            if what == "by request":
                run_task(world.mm.evict(region, index, 1), lambda result, error: None)
                world.mm.run_timers()
            else:
                lose(region.cache, index)
        time.sleep(0.001)
    assert not world.agent.failures


def test_faults_of_one_block_share_one_read(world: World, path: Path) -> None:
    region = world.file(path)
    for tid, index in enumerate((0, 1, 1, 3)):
        world.fault(index, tid=tid)
    assert world.mm.nr_parked == 4
    world.truth = 2  # PRESENT: what the kernel will say once the block is in
    assert world.complete_io() == 1
    assert world.fake.names().count("copy") == 1
    assert world.mm.nr_parked == 0
    assert bytes(region.ptes[:4]) == bytes([PteState.PRESENT]) * 4
    assert world.counter(Counter.pgfault) == 4
    assert world.fake.pages[START + PAGE_SIZE].data == b"\2" * PAGE_SIZE


def test_tail_behind_the_end_of_the_file_is_zero(world: World, path: Path) -> None:
    world.file(path)
    world.fault(7)
    world.complete_io()
    assert world.fake.pages[START + 7 * PAGE_SIZE].data == b"tail".ljust(PAGE_SIZE, b"\0")


def test_copies_of_a_message_are_dropped_while_the_fault_waits(world: World, path: Path) -> None:
    world.file(path)
    for _ in range(1000):  # a signal that is pending for a thread in a system call
        world.fault(5)
    assert world.mm.nr_parked == 1
    world.complete_io()
    assert world.counter(Counter.pgfault) == 1


# --- how a commit may end ----------------------------------------------------------------------------


def test_partial_copy_goes_on_behind_what_is_done(world: World, path: Path) -> None:
    region = world.file(path)
    world.fake.fail("copy", errno.EAGAIN, out=PAGE_SIZE)
    world.fault(0)
    world.complete_io()
    assert [(n, a - START) for n, a, *_ in world.fake.calls] == [
        ("copy", 0), ("copy", PAGE_SIZE), ("wake", 0)
    ]  # fmt: skip
    assert region.ptes[3] == PteState.PRESENT


def test_neighbour_that_is_there_already_is_skipped(world: World, path: Path) -> None:
    world.file(path)
    world.fault(0)
    world.fake.uvm_uffd_copy(-1, START + 2 * PAGE_SIZE, world.mm.zero_folio.address, PAGE_SIZE, 0)
    world.complete_io()
    assert sorted(world.fake.pages) == [START + n * PAGE_SIZE for n in range(4)]
    assert world.trace()[-1].result == FaultResult.MAJOR


def test_page_that_is_there_already_is_verified_and_woken(world: World) -> None:
    world.anon()
    world.truth = 2  # PRESENT
    world.fake.fail("zeropage", errno.EEXIST, out=-errno.EEXIST)
    world.fault(0)
    assert world.fake.names() == ["zeropage", "wake", "wake"]
    assert world.trace()[-1].result == FaultResult.NOPAGE


def test_layout_that_changes_is_tried_again(world: World) -> None:
    region = world.anon()
    world.fake.fail("zeropage", errno.EAGAIN, out=-errno.EAGAIN)
    world.fault(0)
    assert world.mm.nr_parked == 1 and world.mm.next_timeout_ms() is not None
    world.mm.run_timers()
    assert region.ptes[0] == PteState.ZERO
    assert [r.tries for r in world.trace()] == [0, 1]


# --- failure -----------------------------------------------------------------------------------------


def test_failed_read_is_recorded_before_it_poisons(world: World, path: Path) -> None:
    region = world.file(path)
    os.truncate(path, PAGE_SIZE)  # another version, and shorter
    world.fault(2)
    world.complete_io()
    assert world.fake.names() == ["agent.failed", "poison", "wake"]
    assert world.agent.failures == [(region.handle, 2, 3, errno.ENODATA)]
    assert region.ptes[2] == PteState.POISONED
    assert world.trace()[-1].result == FaultResult.SIGBUS
    assert world.counter(Counter.pgfault_failed) == 1


def test_fault_past_its_deadline_is_poisoned_while_the_read_hangs(world: World, path: Path) -> None:
    region = world.file(path)
    region.deadline_ns = 0
    world.fault(1)
    world.mm.run_timers()
    assert world.agent.failures == [(region.handle, 1, 2, errno.ETIMEDOUT)]
    assert region.ptes[1] == PteState.POISONED
    world.complete_io()  # too late: a COPY now would take the poison away
    assert "copy" not in world.fake.names()
    assert region.ptes[1] == PteState.POISONED


def test_hook_that_denies_costs_the_write_permission(world: World, path: Path) -> None:
    region = world.file(path, flags=FaultFlag.TRACKED, hook=lambda offset, n: "deny")
    world.fault(0, access=WRITE)
    world.complete_io()
    assert world.fake.names() == ["agent.protect_read", "wake"]
    assert world.trace()[-1].result == FaultResult.SIGSEGV
    assert region.ptes[0] == PteState.NONE


def test_hook_that_waits_is_asked_again(world: World, path: Path) -> None:
    answers = iter(("wait", "ok"))
    region = world.file(path, flags=FaultFlag.TRACKED, hook=lambda offset, n: next(answers))
    world.fault(0, access=WRITE)
    world.complete_io()
    assert region.ptes[0] == PteState.NONE and world.mm.nr_parked == 1
    while world.mm.nr_parked:
        world.mm.run_timers()
        world.complete_io()
    assert region.ptes[0] == PteState.PRESENT
    assert region.cache is not None and region.cache.state(0) == FolioState.DIRTY


# --- before anything runs ----------------------------------------------------------------------------

SNIPPETS = {
    "good": (
        "def f(mm: Mm, vmf: VmFault[A], w: Walked[A], folio: FolioLocked[A]) -> int:\n"
        "    return finish_fault(mm, vmf, w, folio)",
        None,
    ),
    "forged": ("VmaLocked(object(), region(), 0, 0)", "arg-type"),
    "forged_seal": ("VmaLocked(Seal(), region(), 0, 0)", "call-arg"),
    "forged_without_seal": ("VmaLocked()", "call-arg"),
    "wrong_page": (
        "def f(mm: Mm, vmf: VmFault[A], w: Walked[B], folio: FolioLocked[A]) -> int:\n"
        "    return finish_fault(mm, vmf, w, folio)",
        "misc",
    ),
    "wrong_page_compared": (
        "def f(pte: PteLocked[A], walked: Walked[B]) -> bool:\n    return pte_same(pte, walked)",
        "misc",
    ),
    "step_left_out": (
        "def f(vma: VmaLocked[A]) -> None:\n    with lock_pte(vma):\n        pass",
        "arg-type",
    ),
    "lock_left_out": (
        "def f(mm: Mm, vmf: VmFault[A], w: Walked[A], folio: FolioLocked[A]) -> int:\n"
        "    return set_pte_range(mm, vmf, w, folio)",
        "arg-type",
    ),
    "expired": (
        "def f(mm: Mm, vmf: VmFault[A], walked: Walked[A]) -> VmFaultT:\n"
        "    with lock_pte(walked) as pte:\n        return pte",
        "return-value",
    ),
}
PRELUDE = """
from uffd_vm.service.fault_service.address_space import Region
from uffd_vm.service.fault_service.memory import VmFault, VmFaultT, finish_fault, set_pte_range
from uffd_vm.service.fault_service.mm import Mm
from uffd_vm.service.fault_service.typestate import (
    FolioLocked, PteLocked, Seal, VmaLocked, Walked, lock_pte, pte_same
)

class A: ...
class B: ...
def region() -> Region: ...

"""


@pytest.fixture(scope="module")
def mypy_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of each snippet, in one run."""
    pytest.importorskip("mypy", reason="mypy is not installed; pip install mypy")
    directory = tmp_path_factory.mktemp("snippets")
    for name, (code, _) in SNIPPETS.items():
        (directory / f"{name}.py").write_text(PRELUDE + textwrap.dedent(code) + "\n")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--disable-error-code",
         "empty-body", "--cache-dir", str(directory / "cache"),
         *(f"{name}.py" for name in SNIPPETS)],
        cwd=directory, env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stdout + run.stderr
    lines = run.stdout.splitlines()
    return {
        name: "\n".join(line for line in lines if line.startswith(f"{name}.py"))
        for name in SNIPPETS
    }


@pytest.mark.parametrize("name", SNIPPETS)
def test_mypy_refuses(name: str, mypy_says: dict[str, str]) -> None:
    code = SNIPPETS[name][1]
    if code is None:
        assert mypy_says[name] == ""
    else:
        assert f"[{code}]" in mypy_says[name]


def test_no_token_is_used_after_its_guard() -> None:
    """What mypy cannot see: a name bound by `with ... as token` is dead behind the with."""
    tree = ast.parse(Path(memory.__file__).read_text())
    guards = 0
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for block in (n for n in ast.walk(function) if isinstance(n, ast.With)):
            names = {
                item.optional_vars.id
                for item in block.items
                if isinstance(item.optional_vars, ast.Name)
            }
            guards += len(names)
            inside = {id(n) for n in ast.walk(block)}
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and node.id in names and id(node) not in inside:
                    raise AssertionError(
                        f"{function.name}(): {node.id} is used outside of its guard, "
                        f"line {node.lineno}"
                    )
    assert guards >= 8


def test_what_was_written_is_noted_before_it_is_armed_and_after(world: World) -> None:
    """Whoever takes the notes while a page is being armed does not take those of later stores; and a
    request that ends half way leaves what it had armed noted."""
    region = world.anon()
    notes = region.control.written(region.nr_pages)
    region.set_ptes(0, 2, PteState.PRESENT)
    region.set_ptes(3, 1, PteState.PRESENT)

    def owner_takes_them() -> None:
        assert bytes(notes[:4]) == b"\1\1\0\0"
        notes[:2] = bytes(2)

    world.fake.before("writeprotect", owner_takes_them)
    world.fake.before(
        "writeprotect", lambda: world.fake.fail("writeprotect", errno.ENOMEM, -errno.ENOMEM)
    )
    errors: list[OSError | None] = []
    run_task(world.mm.collect_range(region, 0, 4), lambda _, error: errors.append(error))
    assert errors[0] is not None and errors[0].errno == errno.ENOMEM
    assert bytes(region.ptes[:4]) == bytes(
        (PteState.WRITE_PROTECTED, PteState.WRITE_PROTECTED, PteState.NONE, PteState.PRESENT)
    )
    assert bytes(notes[:4]) == b"\1\1\0\1"
