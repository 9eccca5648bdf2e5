"""Shards -> weights: three progressive stages of the story frame model."""
