"""Lists the packages of the three source folders; everything else is in pyproject.toml."""

from setuptools import find_packages, setup


def _packages(folder: str, name: str) -> list[str]:
    return [name, *(f"{name}.{package}" for package in find_packages(folder))]


setup(
    packages=[
        *_packages("twilight_sgl", "twilight_sgl"),
        *_packages("kernels", "twilight_sgl.kernels"),
        *_packages("patches", "twilight_sgl.patches"),
    ]
)
