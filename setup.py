"""What pyproject.toml cannot say: tasks/ and configs/ lie beside the package here, and inside it in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moe_bsr", "moe_bsr.*"]), "moe_bsr.tasks", "moe_bsr.configs"],
    package_dir={"moe_bsr.tasks": "tasks", "moe_bsr.configs": "configs"},
    package_data={"": ["*.yaml", "sweeps/*.yaml", "methods/*.yaml"], "moe_bsr": ["py.typed", "weights/*.safetensors"]},
)
