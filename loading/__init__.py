"""The core: bytes of safetensors files into tensors, fast. It knows no engine."""
