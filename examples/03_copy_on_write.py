"""Private memory over a file: a store never reaches the file: do_cow_fault().

The page comes in once, by a read or a write; whoever stores into it gets a copy.
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
            memory[0:4] = b"COPY"  # a missing page is written: read it in, the kernel copies it
            print("the memory says", bytes(memory[0:13]))
            memory.release()
            for record in region.trace():
                print(record)
        print("the file says  ", path.read_bytes()[:13])


if __name__ == "__main__":
    main()
