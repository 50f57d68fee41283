"""The shipped test kit: fakes, invariants, Hypothesis strategies, fault injection."""
