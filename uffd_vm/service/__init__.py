"""Running it: the services that resolve faults, and what becomes of those that fail."""
