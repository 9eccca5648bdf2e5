"""Checkpoints: written while training goes on, whole or not at all; read by any number of ranks."""
