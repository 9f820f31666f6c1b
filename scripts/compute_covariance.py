"""Computes the covariance of a text encoder's encodings, which Perfusion measures similarity with.

    python scripts/compute_covariance.py --config configs/perfusion.yaml --output covariance.safetensors

Needed once per base model. Without --captions, 80,000 captions are made of ImageNet's class names and CLIP's templates;
a large text encoder without a GPU is busy with them for long: --limit 8192 is nearly as good.
"""
from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

from ldm.checkpoints.load import load_model  # noqa: E402
from ldm.cli.parser import Parser, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_file  # noqa: E402
from ldm.inference.sampling import read_model_config  # noqa: E402
from ldm.modules.covariance import (  # noqa: E402
    BATCH_SIZE,
    TOKENS,
    CovarianceEstimate,
    condition_number,
    default_captions,
    default_source,
    encoder_fingerprint,
    estimate_covariance,
    mean_energy,
    read_captions,
    save_covariance,
    spread_evenly,
)
from ldm.util import pick_device  # noqa: E402

log = logging.getLogger(__name__)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the base model")
    parser.add_argument("--ckpt", type=Path,
                        help="its weights: .safetensors, .ckpt or diffusers folder (default: the config's)")
    parser.add_argument("--captions", type=Path, metavar="FILE",
                        help="text file, one caption per line, in UTF-8 (default: captions made of ImageNet's names)")
    choices = "; ".join(f"{name}: {meaning}" for name, meaning in TOKENS.items())
    parser.add_argument("--tokens", choices=TOKENS, default="words",
                        help=f"which tokens of a caption count (default: words). {choices}")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="use N captions, evenly spread (default: all)")
    parser.add_argument("--output", type=Path, default=Path("covariance.safetensors"), metavar="FILE",
                        help="where to write the result (default: covariance.safetensors)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--batch_size", type=whole(1), default=BATCH_SIZE, metavar="N",
                        help=f"captions encoded at a time (default: {BATCH_SIZE})")
    return parser.parse_args(arguments)


def text_encoder(model: Any, config: Path) -> Any:
    """The part of a model that encodes prompts."""
    encoder = getattr(model, "cond_stage_model", None)
    if not hasattr(encoder, "encode_tokens"):
        raise UserError(f"--config {config}: its model has no text encoder; name the config of a text-to-image model")
    return encoder


def choose_captions(file: Path | None, limit: int | None) -> tuple[list[str], str]:
    """The captions, and where they are from."""
    if file is None:
        return default_captions(limit), default_source()
    return spread_evenly(read_captions(file), limit), file.name


def describe(found: CovarianceEstimate, tokens: str, source: str) -> list[str]:
    """The lines of the report."""
    energy, width = mean_energy(found.covariance), len(found.covariance)
    return [
        f"captions: {found.captions} used, {found.skipped} too long and left out ({source})",
        f"tokens counted: {found.tokens} ({tokens}: {TOKENS[tokens]})",
        f"condition number: {condition_number(found.covariance):.3g} with the ridge that is added before inverting",
        f"selectivity: mean energy {energy:.1f} of at most {width}, so tokens that have nothing to do with a concept "
        f"are similar to it by about ±{1 / math.sqrt(energy):.3f}",
    ]


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    check_file("--output", options.output)  # found out before hours of work, not after
    config, device = read_model_config(options.config), pick_device(options.device)
    if OmegaConf.select(config, "model.params.covariance") is not None:
        config.model.params.covariance = None  # the config of Perfusion may name the very file that is to be made
    captions, source = choose_captions(options.captions, options.limit)
    encoder = text_encoder(load_model(config, options.ckpt, device), options.config)
    found = estimate_covariance(encoder, captions, options.tokens, options.batch_size)
    for line in describe(found, options.tokens, source):
        log.info(line)
    save_covariance(options.output, found.covariance, source=source, captions=found.captions, tokens=options.tokens,
                    encoder=encoder_fingerprint(encoder))
    log.info("written to %s", options.output)


if __name__ == "__main__":
    main()
