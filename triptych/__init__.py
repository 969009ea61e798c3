"""Triptych: views of an object in, a textured mesh out.

The library: no ComfyUI, no accelerate, no argparse outside ``__main__``. Importing it loads nothing heavy.
"""

__version__ = "0.1.0"
