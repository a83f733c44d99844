"""Gives SGLang its own classes back."""

import sys

_engine = sys.modules["sglang.srt.layers.layernorm"]
GemmaRMSNorm, RMSNorm = _engine.GemmaRMSNorm, _engine.RMSNorm
