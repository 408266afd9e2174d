"""Adds the demo's adapters to the wheel. Everything else is in pyproject.toml.

A file in a wheel lies below a package, and these belong to the clone's `adapters/`, beside their recipes.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Kinds that differ, three megabytes together: the wheel is also what a client installs.
SAMPLES = ("emoji", "pirate", "sentiment", "ticket-ia3", "ticket-prefix")
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")
SOURCE = Path(__file__).parent / "adapters"


class BuildWithSamples(build_py):
    """Copies the samples into `polygraft/samples`; an editable install finds the clone's."""

    def run(self):
        """Build the packages, then copy."""
        super().run()
        if not self.editable_mode:
            for source, target in self._samples():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=True):
        """Everything that `run` writes."""
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._samples())]

    def _samples(self):
        target = Path(self.build_lib) / "polygraft" / "samples"
        yield SOURCE / "demo.json", target / "demo.json"
        for name in SAMPLES:
            for file in FILES:
                yield SOURCE / name / file, target / name / file


setup(cmdclass={"build_py": BuildWithSamples})
