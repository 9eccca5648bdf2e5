"""Raw videos -> labelled shards of story frames."""
