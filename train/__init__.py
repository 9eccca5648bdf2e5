"""Shards -> weights."""
