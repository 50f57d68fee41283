"""Only what pyproject.toml cannot say: the C extension, which cffi compiles from native/."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

build = runpy.run_path(str(Path(__file__).parent / "native" / "build.py"), run_name="native_build")


class BuildExt(build_ext):
    def run(self) -> None:
        build["check_toolchain"]()
        build["write_policy_tables"]()
        super().run()


setup(cffi_modules=["native/build.py:ffibuilder"], cmdclass={"build_ext": BuildExt})
