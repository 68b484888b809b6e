"""Where images come from: one file per kind of source, each registered in `spec.SOURCES`."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
