"""Stands in for the parts of vLLM that SGLang up to 0.5.7 imports on a CPU."""
