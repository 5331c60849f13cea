"""The settings stand in setup.cfg. This file lets the build add the types to the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTypes(build_py):
    """Copies the module, which holds its own annotations, to ``copilot_router-stubs/__init__.pyi``.

    Type checkers do not look into a single module without ``py.typed``, which only packages can
    have; a stub package is found. It is made by the build, so that the repository needs neither a
    second file nor a symbolic link, which git on Windows checks out as a text file.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "copilot_router-stubs")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile("copilot_router.py", folder / "__init__.pyi")


setup(cmdclass={"build_py": BuildWithTypes})
