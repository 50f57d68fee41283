"""A page whose content cannot be had: the touch raises, and no invented byte is ever used.

The file changes under the mapping. Its bytes would be of two versions, so the fault fails: the page is
poisoned, and the thread that touched it gets SourceChanged.
"""

import tempfile
from pathlib import Path

import uffd_vm as uv


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "data.bin")
        path.write_bytes(b"version 1".ljust(64 * 4096, b"."))

        with uv.map(path, mode="r", service="python") as region:
            memory = region.buffer
            print("page 0 says", bytes(memory[0:9]))
            path.write_bytes(b"version 2".ljust(64 * 4096, b"!"))
            try:
                data = bytes(memory[32 * 4096 : 33 * 4096])
                print("not reached:", data[:9])
            except uv.SourceChanged as error:
                print("SourceChanged:", error)
            memory.release()
            for record in region.trace():
                print(record)


if __name__ == "__main__":
    main()
