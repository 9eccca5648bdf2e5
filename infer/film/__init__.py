"""From story frames to a film: what fills a gap between two of them, its parts on disk, and the mp4."""
