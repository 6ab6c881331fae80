"""Short numpy definitions of the operators: slow, exact, for tests and for reading."""
