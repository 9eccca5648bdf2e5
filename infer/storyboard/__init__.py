"""The storyboard: one page in a browser on which a person draws and steers one story project."""
