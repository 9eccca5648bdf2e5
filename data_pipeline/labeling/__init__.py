"""Labels for story frames from a vision-language model: what is asked, what is checked, and what is kept."""
