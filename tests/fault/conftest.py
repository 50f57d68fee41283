"""The policy needs nothing: its tests run in a source tree whose extension was never built."""

import sys
from pathlib import Path
from types import ModuleType

try:
    import uffd_vm  # noqa: F401
except ImportError:
    for name in [name for name in sys.modules if name.split(".")[0] == "uffd_vm"]:
        del sys.modules[name]
    bare = ModuleType("uffd_vm")
    bare.__path__ = [str(Path(__file__).parents[2] / "uffd_vm")]
    sys.modules["uffd_vm"] = bare
