"""What is replaced in vLLM-Omni."""
