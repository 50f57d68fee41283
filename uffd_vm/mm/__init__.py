"""State: the address space, its regions and page caches. Follows mm_struct, vm_area_struct, address_space."""
