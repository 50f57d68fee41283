"""Seeing the first store into each page, and no other: do_wp_page().

Tracked memory is mapped write-protected where it was only read. A store faults once, is logged, and
the page is let go; arming it again makes the next store visible.
"""

import uffd_vm as uv


def main() -> None:
    with uv.anonymous(1 << 20, service="python", track=True) as region:
        memory = region.buffer
        memory[0]  # missing read: zeros, write-protected
        memory[0] = 1  # the first store: a write-protect fault, wp_page_reuse()
        memory[1] = 2  # the page is writable now: no fault
        region.protect()  # armed again
        memory[2] = 3  # so the next store is seen, too
        memory.release()
        for record in region.trace():
            print(record)


if __name__ == "__main__":
    main()
