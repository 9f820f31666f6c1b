"""Say that retrieval-augmented generation (Blattmann et al. 2022), the public script of this name, is left out."""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.common.errors import UserError, one_line_errors  # noqa: E402


@one_line_errors
def main() -> None:
    raise UserError("knn2img: retrieval-augmented generation is left out, since it needs a database of image features; "
                    "use scripts/txt2img.py, or run latent-diffusion's own script on this package")


if __name__ == "__main__":
    main()
