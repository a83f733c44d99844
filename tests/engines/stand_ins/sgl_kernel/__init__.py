"""Stands in for the CUDA kernels of SGLang on a CPU: every name imports, every call raises."""

import importlib.machinery
import sys

__version__ = "0.0.0+cpu.stand.in"


def _names_of(module):
    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"{module}.{name} was called on a CPU")

        missing.__name__ = missing.__qualname__ = name
        return missing

    return __getattr__


class _Submodules:
    """Finds any submodule but ``scalar_type``, for which the engine has a fallback of its own."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(f"{__name__}.") and name != f"{__name__}.scalar_type":
            return importlib.machinery.ModuleSpec(name, _Submodules, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        module.__getattr__ = _names_of(module.__name__)


sys.meta_path.append(_Submodules)
__getattr__ = _names_of(__name__)
