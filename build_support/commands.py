"""The commands of setuptools, with our own compilation behind them."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

from build_support.compilation import Compilation, sources
from build_support.configuration import Configuration

__all__ = ["COMMANDS", "extension"]

MODULE = "mtml_kernels._C"
RECORD = "_build.json"


class KeyedBuild(build):
    """Keeps one build folder per configuration, and starts its package copy afresh.

    pip builds in the source tree and setuptools reuses what lies in build/, so a module that was switched off, renamed
    or deleted would otherwise travel in the next wheel.
    """

    build_base: str

    def finalize_options(self) -> None:
        if self.build_base == "build":
            self.build_base = str(Path("build", Configuration.detect().key))
        super().finalize_options()

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NativeBuild(build_ext):
    """build_ext with our own compile commands: flags per file, several files at a time, only what is out of date."""

    def build_extension(self, ext: Extension) -> None:
        config = Configuration.detect()
        config.check()
        print(f"mtml-kernels: {config.summary()}")
        target = Path(self.get_ext_fullpath(ext.name))
        # Not in build_temp: for an editable install that is a temporary folder, and every file would compile again.
        Compilation(config).build(target)
        target.with_name(RECORD).write_text(config.record())

    def record_mapping(self) -> dict[str, str]:
        """Build record in the build folder -> its place in the source tree (editable installs)."""
        folder = self.get_finalized_command("build_py").get_package_dir(MODULE.rpartition(".")[0])
        built = Path(self.build_lib, *MODULE.split(".")[:-1], RECORD)
        return {str(built): str(Path(folder, RECORD))}

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for built, in_tree in self.record_mapping().items():
            self.copy_file(built, in_tree)

    def get_outputs(self) -> list[str]:
        return sorted({*super().get_outputs(), *self.record_mapping()})

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **(self.record_mapping() if self.inplace else {})}


def extension() -> Extension:
    return Extension(MODULE, [str(path) for path in sources()])


COMMANDS = {"build": KeyedBuild, "build_ext": NativeBuild}
