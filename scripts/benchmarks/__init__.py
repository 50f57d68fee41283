"""Benchmarks of uffd_vm next to the least that plain C has to do; README.md says how."""
