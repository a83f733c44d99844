"""Carries the start-up files into editable installs, which setuptools drops in silence."""

from pathlib import Path
from zipfile import ZipFile

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

START_UP = ("weightlift.pth", "weightlift.start")


class EditableWheel(editable_wheel):
    """An editable wheel that holds the start-up files beside its own."""

    def run(self) -> None:
        """Build the wheel, then add the start-up files at its root."""
        super().run()
        (wheel,) = Path(self.dist_dir).glob("*.whl")
        with ZipFile(wheel, "a") as archive:
            for name in START_UP:
                archive.write(name)


setup(cmdclass={"editable_wheel": EditableWheel})
