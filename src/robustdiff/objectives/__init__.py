"""Training losses: one per file, each an object with ``draw`` (once per batch) and a call (once per pass)."""
