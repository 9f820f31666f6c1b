"""Train a concept encoder for Stable Diffusion: it predicts a concept from photos, without training on them.

    python scripts/train_encoder.py --config configs/stable-diffusion/v1-inference.yaml \\
        --ckpt v1-5-pruned-emaonly.safetensors --out models/my-encoder

No data set is needed. The model generates subjects whose looks the prompts name, a segmenter finds them, and the
model's own text encoder says what the encoder should predict. An interrupted run continues: images are kept.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.checkpoints.early_checks import check_model_files  # noqa: E402
from ldm.cli.parser import Parser, float_in_range, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.hub import check_clip_name, check_model_name  # noqa: E402
from ldm.common.paths import check_folder, expand_home, resolve_path, user_path  # noqa: E402
from ldm.training.encoder_options import EncoderOptions  # noqa: E402


def parse_arguments(arguments: Sequence[str] | None = None) -> EncoderOptions:
    """Read the command line.

    Raises:
        UserError: a flag is wrong, or names what cannot be used.
    """
    parser = Parser(__doc__)
    model = parser.add_argument_group("base model")
    model.add_argument("--config", type=expand_home, required=True, metavar="FILE", help="its config")
    model.add_argument("--ckpt", type=expand_home, metavar="FILE",
                       help=".safetensors, .ckpt or diffusers folder of the base model (default: the config's)")
    _add_image_flags(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--training", type=expand_home, default=EncoderOptions.training, metavar="FILE",
                          help="config of the training (default: %(default)s)")
    training.add_argument("--tower", type=expand_home, metavar="CLIP",
                          help="a CLIP of open_clip, as a folder or ARCHITECTURE/WEIGHTS (default: that of --training)")
    training.add_argument("--max_steps", type=int_in_range(1), metavar="N",
                          help="training steps (default: those of --training)")
    training.add_argument("--strength", type=float_in_range(above=0), default=EncoderOptions.strength,
                          metavar="NUMBER", help="default strength of what it predicts (default: %(default)s)")
    machine = parser.add_argument_group("machine, output")
    machine.add_argument("--out", type=user_path, required=True, metavar="FOLDER",
                         help="folder of the encoder; its images and logs are kept in it, too")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    machine.add_argument("--precision", choices=("full", "autocast"),
                         help="of the images: autocast in 16 bits, full in 32 (default: autocast on cuda)")
    flags = parser.parse_args(arguments)
    options = EncoderOptions(
        config=flags.config, out=flags.out, checkpoint=flags.ckpt, training=flags.training, images=flags.images,
        steps=flags.steps, guidance_scale=flags.scale, seed=flags.seed, segmenter=flags.segmenter, tower=flags.tower,
        strength=flags.strength, batch_size=flags.batch_size, max_steps=flags.max_steps, device=flags.device,
        precision=flags.precision)
    check_options(options)
    return options


def _add_image_flags(parser: Parser) -> None:
    """Add the flags of the images that the encoder is trained on."""
    group = parser.add_argument_group("images")
    group.add_argument("--images", type=int_in_range(40), default=EncoderOptions.images, metavar="N",
                       help="number of images (default: %(default)s)")
    group.add_argument("--steps", type=int_in_range(1), default=EncoderOptions.steps, metavar="N",
                       help="sampling steps of DPM-Solver++ (default: %(default)s)")
    group.add_argument("--scale", type=float_in_range(above=0), metavar="NUMBER",
                       help="guidance scale (default: what the model's config says)")
    group.add_argument("--batch_size", type=int_in_range(1), default=EncoderOptions.batch_size, metavar="N",
                       help="images generated at a time (default: %(default)s)")
    group.add_argument("--segmenter", type=expand_home, metavar="NAME",
                       help="folder or hub name of a CLIPSeg (default: the model's)")
    group.add_argument("--seed", type=int_in_range(0, 2**32), default=EncoderOptions.seed, metavar="N",
                       help="seed of prompts, images and training (default: %(default)s)")


def check_options(options: EncoderOptions) -> None:
    """Raise UserError if options name what cannot be used. What is wrong is found before hours of work, not after."""
    for flag, file in (("--config", options.config), ("--training", options.training)):
        if not resolve_path(file).is_file():
            raise UserError(f"{flag} {file}: no such file")
    check_folder("--out", options.out)
    from omegaconf import OmegaConf  # --help need not wait for these

    from ldm.inference.model_config import read_model_config, segmenter_of

    config = read_model_config(options.config)
    described = OmegaConf.to_container(config, resolve=False)
    check_model_files("--ckpt", options.checkpoint, described)
    if options.checkpoint is None and OmegaConf.select(config, "model.params.ckpt_path") is None:
        raise UserError(f"--config {options.config}: names no weights; give them with --ckpt")
    check_model_name("--segmenter", options.segmenter or segmenter_of(config), "give a folder with a CLIPSeg model")
    training = OmegaConf.load(resolve_path(options.training))
    tower = options.tower or OmegaConf.select(training, "model.params.tower")
    if tower is None:
        raise UserError(f"--training {options.training}: names no model.params.tower; give a config such as "
                        f"{EncoderOptions.training}")
    check_clip_name("--tower", tower)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.training.encoder_training import train_encoder

    train_encoder(options)


if __name__ == "__main__":
    main()
