"""A page that nobody has written reads as zeros, and costs nothing: do_anonymous_page().

A first read maps the kernel's one zero page; a first write gets a page of its own.
"""

import uffd_vm as uv


def main() -> None:
    with uv.anonymous(1 << 20, service="python") as region:
        memory = region.buffer
        print("page 0 reads as", memory[0])  # missing read: the zero page
        memory[4096] = 7  # missing write: a fresh page of zeros, then the store
        print("page 1 reads as", memory[4096], "and", memory[4097])  # present: no fault
        memory.release()
        for record in region.trace():
            print(record)


if __name__ == "__main__":
    main()
