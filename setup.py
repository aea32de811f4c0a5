"""Builds ``mtml_kernels._C``, the compiled module, and writes the build record beside it.

Everything else about the distribution stands in pyproject.toml. PyTorch is never imported here: the C++ and CUDA
sources know raw pointers and sizes only, so a build needs setuptools, pybind11 and a C++17 compiler, takes
nvcc where it finds one, and outlives any upgrade of PyTorch. CONTRIBUTING.md lists the variables that shape it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

# An isolated build has the folder of this file as its working directory, but not on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.commands import COMMANDS, extension

setup(ext_modules=[extension()], cmdclass=COMMANDS)
