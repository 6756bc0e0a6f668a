"""Files of figures that are written while a run goes on."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Write values in place of what a file held; whatever cuts it short leaves that or all of it.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(unfinished, path)
