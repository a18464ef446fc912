"""The flow head, its solvers and guidance."""
