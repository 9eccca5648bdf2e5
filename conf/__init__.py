"""Hydra configuration files, and the one way in which commands read them (command.py)."""
