"""What a story project is made of: its history, its pictures, its views, and files that are whole."""
