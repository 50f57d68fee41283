"""For tests of regions: sizes around page borders, and contents that tell their place."""

from __future__ import annotations

from hypothesis import strategies as st

from uffd_vm.page import PAGE_SIZE, nr_pages

__all__ = ["pattern", "region_sizes"]


def region_sizes(max_pages: int = 40) -> st.SearchStrategy[int]:
    """Bytes, mostly at a page border or one beside it: where off-by-one errors live."""
    whole = st.integers(1, max_pages).map(lambda pages: pages * PAGE_SIZE)
    return st.one_of(
        whole,
        st.builds(
            lambda size, off: max(1, size + off), whole, st.sampled_from([-1, 1, -PAGE_SIZE + 1])
        ),
        st.integers(1, max_pages * PAGE_SIZE),
    )


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that tell their place: page number and seed in each 4 bytes, never zero."""
    words = (
        ((page * 0x9E3779B1 + seed * 0x85EBCA6B + 1) & 0xFFFFFF | 0x01000000).to_bytes(4, "little")
        for page in range(nr_pages(nbytes))
    )
    return b"".join(word * (PAGE_SIZE // 4) for word in words)[:nbytes]
