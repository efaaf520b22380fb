"""Training losses, one in each file: objects with ``draw`` (once for each batch) and ``__call__`` (once for each
pass)."""
