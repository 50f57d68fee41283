"""Private memory over a file: a store never reaches the file: do_cow_fault().

Two steps, one of them ours. The fault service brings the content into the page cache, from which all
private mappings share it: NONE -> CACHED in the trace. The kernel then finds it there, copies it for whoever
stores, and tells nobody: that is why the page is not PRESENT, and why a second store is no fault.
"""

import tempfile
from pathlib import Path

import uffd_vm as uv


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "data.bin")
        path.write_bytes(b"from the file".ljust(64 * 4096, b"."))

        with uv.map(path, mode="c", service="python") as region:
            memory = region.buffer
            memory[0:4] = b"COPY"  # a missing page is written: we cache it, the kernel copies it
            memory[4:6] = b"!!"  # into the copy: no fault
            print("the memory says", bytes(memory[0:13]))
            memory.release()
            for record in region.trace():
                print(record)
            print(region.residency().dirty_bytes, "bytes are private to this process")
        print("the file says  ", path.read_bytes()[:13])


if __name__ == "__main__":
    main()
