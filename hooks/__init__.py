"""How weightlift gets into a process, and how flags, environment and YAML become settings."""
