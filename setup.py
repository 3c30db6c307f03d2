"""What pyproject.toml can't say: `cli/` is the package `vtzoo_cli`, and the catalogue goes into the wheel."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CATALOGUE = "zoo_index.yaml"


class BuildWithCatalogue(build_py):
    """Copies the repository's catalogue beside the library; an editable install reads it where it stands."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            self.copy_file(CATALOGUE, self._target())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name the copied file too, so that an uninstall removes it."""
        return [*super().get_outputs(include_bytecode), self._target()]

    def _target(self) -> str:
        return str(Path(self.build_lib) / "vtzoo" / CATALOGUE)


setup(
    packages=[*find_packages(include=["vtzoo", "vtzoo.*"]), "vtzoo_cli"],
    cmdclass={"build_py": BuildWithCatalogue},
)
