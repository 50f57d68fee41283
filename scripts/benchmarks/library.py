"""uffd_vm as the benchmarks use it: every call of its API is in this file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.floor import PAGE, Toucher


class Unavailable(Exception):
    """The library side of a row cannot be run here; the text says why."""


class Region:
    """A mapped region, with the face that the harness expects of library and floor alike."""

    def __init__(self, region: Any) -> None:
        self._region = region
        self.address = int(region.address)
        self.nbytes = int(region.nbytes)

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._region.close()

    def reset(self) -> None:
        """Every page missing again."""
        self._region.evict()

    def load(self) -> None:
        """Every page present."""
        self._region.load()

    def protect(self) -> None:
        """Every present page write-protected."""
        self._region.protect()

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def faults(self) -> int | None:
        """Not compared: with fault-around, a fault is not a touch."""
        return None


class Protected(Region):
    """A region of private memory whose pages are present: `reset` protects them again."""

    def reset(self) -> None:
        self.protect()


class Library:
    """The doors to uffd_vm. With `enabled=False` each of them says that it is closed."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    def _module(self) -> Any:
        if not self._enabled:
            raise Unavailable("floors only")
        try:
            return importlib.import_module("uffd_vm")
        except ImportError as error:
            raise Unavailable(f"uffd_vm cannot be imported: {error}") from error

    def _function(self, name: str) -> Any:
        function = getattr(self._module(), name, None)
        if function is None:
            raise Unavailable(f"uffd_vm has no {name}()")
        return function

    def map_file(
        self, path: Path, *, service: str = "native", mode: str = "r", one_page: bool = False
    ) -> Region:
        """A file, lazily. `one_page`: one fault brings one page; else the defaults hold."""
        options: dict[str, Any] = {"service": service, "mode": mode}
        if one_page:
            options |= {"fault_around_bytes": PAGE, "readahead_bytes": 0}
        return Region(self._function("map")(str(path), **options))

    def map_files(self, paths: Sequence[Path], *, one_page: bool = False) -> Regions:
        """Many regions."""
        return Regions([self.map_file(path, one_page=one_page) for path in paths])

    def protected(self, nbytes: int, *, service: str) -> Protected:
        """Private memory, all of it present and write-protected, shared with nobody."""
        region = Protected(self._function("anonymous")(nbytes, service=service, track=True))
        region.load()
        # Every page written once: not the shared zero page, whose first write costs a page more.
        Toucher(range(0, nbytes, PAGE)).touch(region.address, write=True)
        region.protect()
        return region


class Regions:
    """Many regions touched as one: offsets are addresses."""

    address = 0

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def __enter__(self) -> Regions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for region in self.regions:
            region.close()

    def reset(self) -> None:
        for region in self.regions:
            region.reset()

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def faults(self) -> int | None:
        return None
