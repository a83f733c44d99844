"""What is installed, whether a patch fits it, and what became of each patch."""
