"""Import the modules that are named on the command line: `import_modules.py MODULE ...`."""
from __future__ import annotations

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)
