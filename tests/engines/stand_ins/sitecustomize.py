"""SGLang 0.4 on a newer torch: one function that moved since, put back once torch is imported."""

import importlib.util
import sys


class _AfterTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(_AfterTorch)
        spec = importlib.util.find_spec("torch")
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            cpu = module._C._cpu
            if not hasattr(cpu, "_is_amx_tile_supported"):
                cpu._is_amx_tile_supported = lambda: False

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterTorch)
