"""What setup.py does, in parts; needs the standard library, setuptools and, to compile, pybind11. Never installed."""
