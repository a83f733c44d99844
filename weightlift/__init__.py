"""Load model weights at the speed of the hardware in SGLang.

Importing this package imports neither torch nor an engine: the start-up hook goes through here.
"""

__version__ = "0.1.0"
