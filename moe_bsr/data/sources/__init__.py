"""Sources of images. Each file here registers one kind of source in `spec.SOURCES`; all files are imported."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
