"""Gives SGLang its own classes back."""

import sys

_engine = sys.modules["sglang.srt.layers.activation"]
GeluAndMul, SiluAndMul = _engine.GeluAndMul, _engine.SiluAndMul
