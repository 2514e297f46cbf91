"""The metadata is in pyproject.toml. This file adds the programs to wheels, where tubelet.config.shipped finds them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("app/**/*.py", "evals/**/*.py", "benchmarks/costs.py", "benchmarks/plan.py", "configs/**/*.yaml")
# Files of a project's own folders `app` and `evals` can still be imported, as in a checkout.
INIT = '__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n'


class BuildPy(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "tubelet", "programs")
        shutil.rmtree(target, ignore_errors=True)
        for path in (path for pattern in FILES for path in Path().glob(pattern)):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path)
        for package in ("app", "evals", "benchmarks"):
            (target / package / "__init__.py").write_text(INIT, encoding="utf-8")


setup(cmdclass={"build_py": BuildPy})
