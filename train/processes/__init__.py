"""The processes of a run: how they start, share the work, notice each other's end, and stop."""
