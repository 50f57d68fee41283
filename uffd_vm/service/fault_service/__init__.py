"""The process behind service="python": the fault path of mm/memory.c in Python, on real faults.

`python -m uffd_vm.service.fault_service` is started by uffd_vm.service.python. Reading order:
typestate (which locks prove what), memory (the fault path), userfaultfd (its ioctls), mm (who waits,
work without faults), filemap (page cache), __main__ (the loop).
"""
