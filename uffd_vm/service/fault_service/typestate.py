"""The locks of the fault path as tokens: VmaLocked -> Walked -> PteLocked -> FolioLocked -> Installed.

mm/memory.c says in comments which lock is held where, and asserts it far away. Here a function that
needs a lock takes the token that proves it. Three rules, each kept twice:

- a token is made only by its guard, a context manager: its constructor wants a seal that nobody
  else has (mypy: a missing argument; run time: TypestateError);
- it dies with its guard: every use of a dead one raises (statically: the verbs return FaultResult,
  which no token is, and a test reads our source for uses after the `with`);
- it is good for one page: each carries (region, index, version), compared at every use, and the type
  parameter P brands tokens of one fault, so that mypy refuses those of two different ones together.

The order of the chain is in the signatures: nothing but a VmaLocked makes a Walked, and so on. A page
changes hands between walk and lock, so PteLocked alone does not say that the page is as walked:
pte_same() does, as in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeVar, final

from uffd_vm.errors import StaleRegionError, UffdVmError

if TYPE_CHECKING:
    from uffd_vm.service.fault_service.address_space import AddressSpace, Region
    from uffd_vm.service.fault_service.filemap import Read, ZeroFolio
    from uffd_vm.service.fault_service.memory import VmFault

P = TypeVar("P")  # which fault: never given a meaning, only kept apart


class TypestateError(UffdVmError):
    """A lock's token was forged, outlived its guard, or belongs to another page: a bug of ours."""


@final
class Seal:
    """What only this module holds. Not constructible elsewhere: `_SEAL` is the only one."""

    __slots__ = ()

    def __new__(cls, nobody_has_one: NoReturn) -> Seal:
        raise TypestateError("a seal is not for the making")


_SEAL: Final[Seal] = object.__new__(Seal)


class _Token(Generic[P]):
    __slots__ = ("alive", "index", "region", "version")

    def __init__(self, seal: Seal, region: Region, index: int, version: int) -> None:
        if seal is not _SEAL:
            raise TypestateError(f"{type(self).__name__} is made only by its guard")
        self.region = region
        self.index = index
        self.version = version
        self.alive = True

    def _no_longer_valid(self) -> TypestateError:
        return TypestateError(f"{type(self).__name__} of page {self.index} outlived its guard")

    def _wrong_page(self, other: _Token[P]) -> TypestateError:
        return TypestateError(
            f"{type(self).__name__} is of page {self.index}, "
            f"{type(other).__name__} of page {other.index}"
        )


@final
class VmaLocked(_Token[P]):
    """The region is live and stays so: it cannot be detached while this token lives."""

    __slots__ = ()


@final
class Walked(_Token[P]):
    """The page's entry as it was read without a lock: vmf->orig_pte. A snapshot, never the truth."""

    __slots__ = ("kind", "orig_pte")

    kind: int
    orig_pte: int  # Region.walk()


@final
class PteLocked(_Token[P]):
    """vmf->ptl is held: nobody else may change this page's entry, nor commit to it."""

    __slots__ = ()


@final
class FolioLocked(_Token[P]):
    """The content of the page, complete, and nobody else's to fill. Goes back when the token dies."""

    __slots__ = ("read",)

    read: Read | ZeroFolio


@final
class Installed(_Token[P]):
    """The page is in the page table and its state is published; its waiters are woken as this dies."""

    __slots__ = ("nr_pages", "start_index")

    start_index: int
    nr_pages: int


# --- guards ---------------------------------------------------------------------------------------


class lock_vma(Generic[P]):
    """Looks the fault's region up by handle and generation and takes its read lock.

    StaleRegionError if the region was dropped, or is another one by now. The region object is
    good for as long as the token lives, and no longer.
    """

    __slots__ = ("_space", "_token", "_vmf")

    def __init__(self, space: AddressSpace, vmf: VmFault[P]) -> None:
        self._space = space
        self._vmf = vmf

    def __enter__(self) -> VmaLocked[P]:
        vmf = self._vmf
        region = self._space.get(vmf.handle)
        if region is None or region.closing or region.generation != vmf.generation:
            raise StaleRegionError(f"region {vmf.handle:#x} was dropped")
        region.readers += 1
        self._token: VmaLocked[P] = VmaLocked(_SEAL, region, vmf.index, 0)
        return self._token

    def __exit__(self, *exc: object) -> None:
        self._token.alive = False
        self._token.region.readers -= 1


class walk(Generic[P]):
    """Reads the page's entry without its lock. The snapshot is good until the guard ends."""

    __slots__ = ("_kind", "_token", "_vma")

    def __init__(self, vma: VmaLocked[P], kind: int) -> None:
        self._vma = vma
        self._kind = kind

    def __enter__(self) -> Walked[P]:
        vma = self._vma
        if not vma.alive:
            raise vma._no_longer_valid()
        region, index = vma.region, vma.index
        token: Walked[P] = Walked(_SEAL, region, index, region.versions[index])
        token.kind = self._kind
        token.orig_pte = region.walk(index, self._kind)
        self._token = token
        return token

    def __exit__(self, *exc: object) -> None:
        self._token.alive = False


class lock_pte(Generic[P]):
    """pte_offset_map_lock(). Whether the entry still is what was walked: ask pte_same()."""

    __slots__ = ("_token", "_walked")

    def __init__(self, walked: Walked[P]) -> None:
        self._walked = walked

    def __enter__(self) -> PteLocked[P]:
        walked = self._walked
        if not walked.alive:
            raise walked._no_longer_valid()
        region, index = walked.region, walked.index
        if index in region.locked:
            raise TypestateError(f"the lock of page {index} is taken: it does not nest")
        region.locked.add(index)
        self._token: PteLocked[P] = PteLocked(_SEAL, region, index, region.versions[index])
        return self._token

    def __exit__(self, *exc: object) -> None:
        self._token.alive = False
        self._walked.region.locked.discard(self._walked.index)


class lock_folio(Generic[P]):
    """Takes a finished read for this page; on exit gives its buffer back once nobody waits for it."""

    __slots__ = ("_read", "_token", "_walked")

    def __init__(self, walked: Walked[P], read: Read | ZeroFolio) -> None:
        self._walked = walked
        self._read = read

    def __enter__(self) -> FolioLocked[P]:
        walked, read = self._walked, self._read
        if not walked.alive:
            raise walked._no_longer_valid()
        if not read.holds(walked.region.pgoff + walked.index):
            raise TypestateError(f"the folio does not hold page {walked.index}")
        read.pins += 1
        token: FolioLocked[P] = FolioLocked(_SEAL, walked.region, walked.index, walked.version)
        token.read = read
        self._token = token
        return token

    def __exit__(self, *exc: object) -> None:
        self._token.alive = False
        self._read.unpin()


class install(Generic[P]):
    """set_pte_at() has happened for [start_index, start_index + nr_pages): publish while the token
    lives; leaving the guard wakes the waiters. So nobody runs on before it can be seen why."""

    __slots__ = ("_pte", "_token", "_wake")

    def __init__(
        self,
        pte: PteLocked[P],
        start_index: int,
        nr_pages: int,
        wake: Callable[[Region, int, int], None],
    ) -> None:
        held(pte)
        if not start_index <= pte.index < start_index + nr_pages:
            raise TypestateError(f"page {pte.index} is not in what was committed")
        token: Installed[P] = Installed(_SEAL, pte.region, pte.index, pte.version)
        token.start_index = start_index
        token.nr_pages = nr_pages
        self._token = token
        self._wake = wake

    def __enter__(self) -> Installed[P]:
        return self._token

    def __exit__(self, *exc: object) -> None:
        self._token.alive = False
        token = self._token
        self._wake(token.region, token.start_index, token.nr_pages)


# --- questions -------------------------------------------------------------------------------------


def held(token: _Token[P]) -> None:
    """lockdep_assert_held(): raises unless a guard made this token and still stands."""
    if not token.alive:
        raise token._no_longer_valid()


def same_page(a: _Token[P], b: _Token[P]) -> None:
    """Both are alive and of one page: raises otherwise."""
    if not a.alive:
        raise a._no_longer_valid()
    if not b.alive:
        raise b._no_longer_valid()
    if a.index != b.index or a.region is not b.region:
        raise a._wrong_page(b)


def pte_unmap_same(walked: Walked[P]) -> bool:
    """Is the entry still what we walked? An early look without the lock: it saves work that would be in
    vain, and protects nothing; pte_same() does."""
    held(walked)
    region, index = walked.region, walked.index
    version_same = region.versions[index] == walked.version
    return version_same and region.walk(index, walked.kind) == walked.orig_pte


def pte_same(pte: PteLocked[P], walked: Walked[P]) -> bool:
    """Is the entry, now that we hold its lock, what we walked? False: somebody was faster."""
    same_page(pte, walked)
    region = pte.region
    return pte.version == walked.version and region.walk(pte.index, walked.kind) == walked.orig_pte
