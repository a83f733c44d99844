"""Every name imports, every call raises."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"vllm._custom_ops.{name} was called on a CPU")

    return missing
