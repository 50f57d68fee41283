"""A file as memory: what is touched is read, with its neighbours (fault-around): do_read_fault()."""

import tempfile
from pathlib import Path

import uffd_vm as uv


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "data.bin")
        path.write_bytes(bytes(n // 4096 for n in range(64 * 4096)))

        with uv.map(path, mode="r", service="python") as region:
            pages = region.array("uint8", shape=(-1, 4096))
            print("page 40 holds", pages[40, 0])  # a fault: read 64 KiB, map 16 pages
            print("page 41 holds", pages[41, 0])  # came along: no fault
            del pages
            for record in region.trace():
                print(record)


if __name__ == "__main__":
    main()
