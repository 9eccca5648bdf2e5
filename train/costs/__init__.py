"""What a run needs, counted before it is launched."""
