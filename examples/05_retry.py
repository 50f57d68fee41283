"""A page that must come from the disk: the fault is parked, and starts again: VM_FAULT_RETRY.

The handler never waits with a lock held. It starts the read, answers RETRY, and when the read is
complete walks again from the top (TRIED): the region may have gone meanwhile, or the page come.
"""

import os
import tempfile
from pathlib import Path

import uffd_vm as uv


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "data.bin")
        path.write_bytes(b"cold".ljust(64 * 4096, b"."))
        with path.open("rb") as file:  # out of the kernel's page cache, so that it must be read
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        with uv.map(path, mode="r", service="python") as region:
            memory = region.buffer
            print("page 0 says", bytes(memory[0:4]))
            memory.release()
            for record in region.trace():
                print(f"try {record.tries}:", record)


if __name__ == "__main__":
    main()
