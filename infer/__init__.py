"""A story and any given frames -> story frames."""
