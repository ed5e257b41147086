"""PyTorch's own operator database as a test suite: ``python -m tests.coverage`` writes the table that is committed."""
