"""What is measured and drawn while a run trains."""
