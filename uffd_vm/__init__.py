"""Lazy memory for Python: ordinary memory whose pages arrive when they are touched.

import uffd_vm as uv

with uv.map("data.bin", service="native") as region:
    a = region.array("float32", shape=(-1, 128))   # a real ndarray; nothing is read yet
    print(a[1000].sum())
    del a
"""

from uffd_vm.config import config
from uffd_vm.errors import (
    BudgetExceeded,
    FeatureUnavailable,
    HandlerReplaced,
    InvalidArgument,
    PagerDied,
    PermissionUnavailable,
    RegionBusyError,
    RegionClosedError,
    SourceChanged,
    SourceError,
    SourceTimeout,
    StaleRegionError,
    UffdError,
    UffdVmError,
)
from uffd_vm.mm.address_space import AddressSpace, address_space, anonymous, map
from uffd_vm.mm.region import Region
from uffd_vm.page import PAGE_SIZE
from uffd_vm.stats import Latency, Residency, Stats, TraceRecord

__version__ = "0.1.0"

__all__ = [
    "PAGE_SIZE",
    "AddressSpace",
    "BudgetExceeded",
    "FeatureUnavailable",
    "HandlerReplaced",
    "InvalidArgument",
    "Latency",
    "PagerDied",
    "PermissionUnavailable",
    "Region",
    "RegionBusyError",
    "RegionClosedError",
    "Residency",
    "SourceChanged",
    "SourceError",
    "SourceTimeout",
    "StaleRegionError",
    "Stats",
    "TraceRecord",
    "UffdError",
    "UffdVmError",
    "__version__",
    "address_space",
    "anonymous",
    "config",
    "map",
]
