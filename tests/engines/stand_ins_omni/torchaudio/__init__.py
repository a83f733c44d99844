"""Stands in for torchaudio, whose library does not load beside torch for a CPU.

vLLM-Omni's command line imports it and asks nothing of it.
"""
