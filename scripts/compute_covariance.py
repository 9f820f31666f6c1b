"""Compute the covariance C of a text encoder's outputs, with which Perfusion measures similarity.

    python scripts/compute_covariance.py --config configs/perfusion.yaml --output covariance.safetensors

Each base model needs it once. Without --captions, it is computed from 80,000 captions: the class names of ImageNet in
CLIP's templates. A large text encoder takes long for these without a GPU; --limit 8192 is nearly as good.
"""
from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.parser import Parser, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_file, resolve_path, user_path  # noqa: E402

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm.modules.covariance import CovarianceEstimate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CovarianceOptions:
    """Options of the script.

    Attributes:
        config: YAML file of the base model.
        checkpoint: its weights; None: those that the config names.
        captions: text file with one caption per line; None: the default captions.
        tokens: which tokens of a caption count, a key of `ldm.modules.covariance.TOKENS`.
        limit: number of captions, spread evenly; None: all.
        output: file to write.
        device: such as "cuda:1"; None: the fastest there is.
        batch_size: captions encoded at a time.
    """

    config: Path
    output: Path
    checkpoint: Path | None = None
    captions: Path | None = None
    tokens: str = "words"
    limit: int | None = None
    device: str | None = None
    batch_size: int = 64


def parse_arguments(arguments: Sequence[str] | None = None) -> CovarianceOptions:
    """Read the command line.

    Raises:
        UserError: a flag is wrong, or the output file cannot be written.
    """
    parser = Parser(__doc__)
    parser.add_argument("--config", type=user_path, required=True, help="YAML file of the base model")
    parser.add_argument("--ckpt", type=user_path,
                        help="its weights: .safetensors, .ckpt or diffusers folder (default: the config's)")
    parser.add_argument("--captions", type=user_path, metavar="FILE",
                        help="text file, one caption per line, in UTF-8 (default: captions made of ImageNet's names)")
    parser.add_argument("--tokens", default=CovarianceOptions.tokens, metavar="WHICH",
                        help="which tokens of a caption count: words, no_padding (words, start and end) or all "
                        "(default: %(default)s)")
    parser.add_argument("--limit", type=int_in_range(1), metavar="N",
                        help="use N captions, evenly spread (default: all)")
    parser.add_argument("--output", type=user_path, default=Path("covariance.safetensors"), metavar="FILE",
                        help="file to write (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest there is)")
    parser.add_argument("--batch_size", type=int_in_range(1), default=CovarianceOptions.batch_size, metavar="N",
                        help="captions encoded at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Found out before hours of work, not after.
    check_file("--output", options.output)
    for flag, path in (("--config", options.config), ("--ckpt", options.ckpt), ("--captions", options.captions)):
        if path is not None and not resolve_path(path).exists():
            raise UserError(f"{flag} {path}: no such file")
    return CovarianceOptions(options.config, options.output, options.ckpt, options.captions, options.tokens,
                             options.limit, options.device, options.batch_size)


def compute_covariance(options: CovarianceOptions) -> None:
    """Compute C, log a report, and write the file.

    Raises:
        UserError: the config, the captions or the weights cannot be used, or the model has no text encoder.
    """
    from ldm.checkpoints import load
    from ldm.inference.model_config import read_model_config
    from ldm.modules.covariance import TOKENS, encoder_fingerprint, estimate_covariance
    from ldm.modules.covariance_files import save_covariance
    from ldm.util import pick_device

    if options.tokens not in TOKENS:
        raise UserError(f"--tokens {options.tokens}: give one of {', '.join(TOKENS)}")
    config, device = read_model_config(options.config), pick_device(options.device)
    forget_covariance(config)
    captions, source = choose_captions(options.captions, options.limit)
    encoder = text_encoder(load.load_model(config, options.checkpoint, device), options.config)
    estimate = estimate_covariance(encoder, captions, options.tokens, options.batch_size)
    for line in describe(estimate, options.tokens, source):
        log.info(line)
    save_covariance(options.output, estimate.covariance, source=source, captions=estimate.captions,
                    tokens=options.tokens, encoder=encoder_fingerprint(encoder))
    log.info("written to %s", options.output)


def forget_covariance(config: DictConfig) -> None:
    """Remove the covariance from a config of Perfusion, which may name the very file that is to be written."""
    from omegaconf import OmegaConf

    if OmegaConf.select(config, "model.params.covariance") is not None:
        config.model.params.covariance = None


def choose_captions(file: Path | None, limit: int | None) -> tuple[list[str], str]:
    """Return the captions of a file, or else the default ones, and the name of their source."""
    from ldm.modules.covariance import default_captions, default_source, read_captions, spread_evenly

    if file is None:
        return default_captions(limit), default_source()
    return spread_evenly(read_captions(file), limit), file.name


def text_encoder(model: Any, config: Path) -> Any:
    """Return the text encoder of a model.

    Raises:
        UserError: it has none.
    """
    encoder = getattr(model, "cond_stage_model", None)
    if not hasattr(encoder, "encode_tokens"):
        raise UserError(f"--config {config}: its model has no text encoder; name the config of a text-to-image model")
    return encoder


def describe(estimate: CovarianceEstimate, tokens: str, source: str) -> list[str]:
    """Return the lines of the report.

    The energy of an encoding e is e^T C^-1 e. Between two unrelated encodings the similarity s has a standard deviation
    of about 1 / sqrt(mean energy), which is at most the width of the encodings.
    """
    from ldm.modules.covariance import TOKENS, condition_number, mean_energy

    energy, width = mean_energy(estimate.covariance), len(estimate.covariance)
    return [
        f"captions: {estimate.captions} used, {estimate.skipped} too long and left out ({source})",
        f"tokens counted: {estimate.tokens} ({tokens}: {TOKENS[tokens]})",
        f"condition number: {condition_number(estimate.covariance):.3g}, with the ridge that is added before inversion",
        f"selectivity: mean energy {energy:.1f} of at most {width}; tokens that are unrelated to a concept have a "
        f"similarity of about ±{1 / math.sqrt(energy):.3f} to it",
    ]


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    compute_covariance(parse_arguments(arguments))


if __name__ == "__main__":
    main()
