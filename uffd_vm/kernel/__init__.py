"""What Linux gives: userfaultfd and its neighbours, as typed Python. Decides nothing.

`_lib` is the only importer of the compiled extension, and `_lib.check` the only place that makes an
exception of a number. `uffd` owns the file descriptor, `features` knows what this kernel and this process
may do, `msg` parses messages, `mapping` reads page tables and mappings back.
"""
