"""Export the mini models from their training runs to the files in `models/mini/`.

    python scripts/mini/export.py autoencoder logs/..._autoencoder
    python scripts/mini/export.py decoder logs/..._decoder
    python scripts/mini/export.py clip logs/..._clip
    python scripts/mini/export.py evaluation_clip logs/..._evaluation_clip
    python scripts/mini/export.py text2img logs/..._text2img
    python scripts/mini/export.py covariance
    python scripts/mini/export.py segmenter logs/..._segmenter
    python scripts/mini/export.py encoder logs/..._encoder

The order matters: later parts are trained with the exports of earlier ones. `scripts/mini/rebuild.py` does all of it.
Weights are stored in half precision. They are the moving averages if the run kept any. Word embedding tables keep only
the rows of words in the captions. `training.json`, beside the weights, describes how each part was trained.
"""
from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from ldm.checkpoints.averages import AVERAGES, moving_averages  # noqa: E402
from ldm.checkpoints.diffusers_names import clip_text_tensors  # noqa: E402
from ldm.checkpoints.packed_tables import pack_table  # noqa: E402
from ldm.checkpoints.read import read_state_dict  # noqa: E402
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.atomic_write import write_atomically  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.files import save_tensors  # noqa: E402
from ldm.common.paths import PROJECT_ROOT, check_folder, resolve_path, user_path  # noqa: E402
from ldm.data.mini.composed_subjects import all_looks  # noqa: E402
from ldm.data.mini.scenes import SceneDataset  # noqa: E402
from ldm.models.clip_images import CLIP_MEAN, CLIP_STD  # noqa: E402
from ldm.models.mini.openclip import OpenCLIPTrainer  # noqa: E402
from ldm.models.open_clip_folder import SETTINGS  # noqa: E402
from ldm.modules.concept_encoder import EncoderSettings, save_encoder  # noqa: E402
from ldm.modules.covariance import encoder_fingerprint, estimate_covariance  # noqa: E402
from ldm.modules.covariance_files import save_covariance  # noqa: E402
from ldm.modules.encoders.clip import special_tokens  # noqa: E402
from ldm.modules.encoders.modules import TOKENIZER, FrozenCLIPEmbedder  # noqa: E402
from ldm.modules.residual_segmenter import ResidualSegmenter  # noqa: E402
from ldm.training.run_record import newest_config, record_run  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402

log = logging.getLogger(__name__)

MINI = PROJECT_ROOT / "models" / "mini"
PARTS = "parts"  # folder of the weights that only training needs; it is not in the repository
CAPTIONS = 20_000
ENCODER_STRENGTH = 1.2  # predicted moves are shorter than told ones: 0.86 on sprites that are held out
LATENT_SCENES, BATCH_SIZE = 2048, 64  # to measure the latents on


def last_checkpoint(run: Path) -> tuple[dict[str, Tensor], OmegaConf]:
    """Return the newest weights of a training run, and its config."""
    config = newest_config(run, "project")
    return read_state_dict(run / "checkpoints" / "last.ckpt"), config


def load_trained_model(run: Path, **params: Any) -> torch.nn.Module:
    """Return the model of a run with its newest weights; `params` replace those of its config."""
    tensors, config = last_checkpoint(run)
    config.model.params.update(params)
    model = instantiate_from_config({key: config.model[key] for key in ("target", "params")})
    model.load_state_dict(tensors)
    return model


def to_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert parameters to half precision. Keys without a dot are the noise schedule, which needs full precision."""
    converted = {}
    for key, value in tensors.items():
        is_parameter = "." in key and value.is_floating_point()
        converted[key] = value.half() if is_parameter else value
    return converted


@functools.cache
def world_captions(count: int = CAPTIONS) -> tuple[str, ...]:
    """Return the distinct captions of `count` scenes, sorted."""
    scenes = SceneDataset(seed=2)
    return tuple(sorted({scenes.plan(index).caption for index in range(count)}))


def used_tokens(tokenizer: object) -> Tensor:
    """Return the tokens that occur in the captions of the mini world, sorted."""
    captions = list(world_captions())
    return torch.tensor(sorted({token for row in tokenizer(captions)["input_ids"] for token in row}))


def pack_word_tables(tensors: dict[str, Tensor], tokenizer: object) -> dict[str, Tensor]:
    """Return the tensors with every word embedding table packed."""
    used = used_tokens(tokenizer)
    packed = {}
    for key, value in tensors.items():
        packed |= pack_table(key, value, used) if key.endswith("token_embedding.weight") else {key: value}
    return packed


@torch.no_grad()
def export_autoencoder(run: Path, folder: Path) -> None:
    """Export the first stage, with its latents normalized to mean 0 and variance 1 in every channel."""
    model = load_trained_model(run).eval()
    scenes = SceneDataset(seed=4)
    batches = []
    for start in range(0, LATENT_SCENES, BATCH_SIZE):
        images = torch.stack([scenes[index]["image"] for index in range(start, start + BATCH_SIZE)])
        batches.append(model.encode(images).sample())
    latents = torch.cat(batches)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    log.info("channel means %.2f to %.2f, standard deviations %.2f to %.2f", mean.min(), mean.max(), std.min(),
             std.max())
    fold_normalization(model, mean, std)
    save_tensors(folder / PARTS / "autoencoder.safetensors", model.state_dict(), {"run": run.name})


def export_decoder(run: Path, folder: Path) -> None:
    """Export the first stage again, with a decoder that was trained further. Its latents do not change."""
    tensors, _ = last_checkpoint(run)
    check_same_latents(run, tensors, read_state_dict(folder / PARTS / "autoencoder.safetensors"))
    save_tensors(folder / PARTS / "autoencoder.safetensors", tensors, {"run": run.name})


def check_same_latents(run: Path, tensors: dict[str, Tensor], exported: dict[str, Tensor]) -> None:
    """Raise UserError if the encoders of two first stages differ."""
    prefixes = ("encoder.", "quant_conv.")
    encoder = {key: value for key, value in tensors.items() if key.startswith(prefixes)}
    expected = {key: value for key, value in exported.items() if key.startswith(prefixes)}
    same_keys = encoder.keys() == expected.keys()
    if not same_keys or not all(torch.equal(value, expected[key]) for key, value in encoder.items()):
        raise UserError(f"{run}: its latents differ from those of the exported autoencoder; export the autoencoder "
                        "that this run started from")


def fold_normalization(model: torch.nn.Module, mean: Tensor, std: Tensor) -> None:
    """Make (z - mean) / std the new latent, by changing the 1x1 convolutions before and after it."""
    before, after, z = model.quant_conv, model.post_quant_conv, len(mean)
    before.weight[:z] /= std[:, None, None, None]
    before.bias[:z].sub_(mean).div_(std)
    before.bias[z:] -= 2 * std.log()  # the second half of the channels are logarithms of variances
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[:, None, None]


def export_clip(run: Path, folder: Path) -> None:
    """Export the CLIP for `open_clip`, and its text tower for `transformers`, with which the U-Net is trained."""
    model = load_trained_model(run)
    write_openclip(folder / "clip", model, {"format": "pt", "run": run.name})
    config = text_tower_config(model)
    tensors = clip_text_tensors(model.clip.state_dict(), CLIPTextModel(config).state_dict())
    target = folder / PARTS / "text_encoder"
    save_tensors(target / "model.safetensors", to_half(pack_word_tables(tensors, model.tokenizer)),
                 {"format": "pt", "run": run.name})
    config.save_pretrained(target)


def text_tower_config(model: OpenCLIPTrainer) -> CLIPTextConfig:
    """Return the `transformers` config of the text tower of a CLIP of `open_clip`."""
    tower = model.settings["text_cfg"]
    return CLIPTextConfig(
        hidden_size=tower["width"], intermediate_size=4 * tower["width"], num_hidden_layers=tower["layers"],
        num_attention_heads=tower["heads"], max_position_embeddings=tower["context_length"],
        projection_dim=model.settings["embed_dim"], hidden_act="gelu", **special_tokens(model.tokenizer))


def export_evaluation_clip(run: Path, folder: Path) -> None:
    """Export the second CLIP, for `open_clip`."""
    write_openclip(folder / "evaluation_clip", load_trained_model(run), {"format": "pt", "run": run.name})


def write_openclip(folder: Path, model: OpenCLIPTrainer, metadata: dict[str, str]) -> None:
    """Write weights and settings in the layout that `open_clip` calls local-dir, except for the packed word table."""
    settings = {"model_cfg": model.settings, "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}
    tensors = to_half(pack_word_tables(model.clip.state_dict(), model.tokenizer))
    save_tensors(folder / "model.safetensors", tensors, metadata)
    write_json(folder / SETTINGS, settings)


def write_json(path: Path, settings: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1) + "\n"))


def export_text2img(run: Path, folder: Path) -> None:
    """Export one checkpoint with the keys of Stable Diffusion: averaged U-Net, text tower, and exported first stage."""
    tensors, config = last_checkpoint(run)
    stage = "first_stage_model."
    exported = read_state_dict(folder / PARTS / "autoencoder.safetensors")
    own = {key.removeprefix(stage): value for key, value in tensors.items() if key.startswith(stage)}
    check_same_latents(run, own, exported)

    # The decoder of the exported first stage may be better than the one of this run.
    tensors |= {stage + key: value for key, value in exported.items()}
    averaged = tensors | moving_averages(tensors)
    weights = {key: value for key, value in averaged.items() if not key.startswith(AVERAGES)}
    packed = to_half(pack_word_tables(weights, CLIPTokenizer.from_pretrained(TOKENIZER)))
    save_tensors(folder / "model.safetensors", packed, {"format": "pt", "run": run.name})
    settings = config.model.params.cond_stage_config.params.version
    CLIPTextConfig.from_pretrained(settings).save_pretrained(folder / "text_encoder")


def export_segmenter(run: Path, folder: Path) -> None:
    """Export the segmenter in the form that `ldm.modules.segmentation` loads."""
    model = load_trained_model(run, clip=str(folder / "clip"))  # the path in the run's own config may be outdated
    target, segmenter = folder / "segmenter", model.segmenter
    save_tensors(target / "model.safetensors", to_half(pack_word_tables(segmenter.state_dict(), model.tokenizer)),
                 {"format": "pt", "run": run.name})
    side = segmenter.config["vision_cfg"]["image_size"]
    write_json(target / "config.json", {"model_type": ResidualSegmenter.model_type, **segmenter.config})
    write_json(target / "preprocessor_config.json", {"size": {"height": side, "width": side}, "resample": 3,
                                                    "image_mean": CLIP_MEAN, "image_std": CLIP_STD})


def export_encoder(run: Path, folder: Path) -> None:
    """Export the head of the concept encoder, with the words that its log chooses among."""
    model = load_trained_model(run, ckpt_path=str(folder / "model.safetensors"))
    settings = EncoderSettings(
        tower=path_in_project(model.tower), base=model.base_model.fingerprint, templates=model.templates,
        looks=all_looks(), strength=ENCODER_STRENGTH, projection="gated")
    save_encoder(folder / "encoder", model.head, settings, {"run": run.name})


def path_in_project(path: str) -> str:
    """Return a path as it counts from the project's root, if it is in there."""
    full = resolve_path(path).resolve()
    return str(full.relative_to(PROJECT_ROOT)) if full.is_relative_to(PROJECT_ROOT) else path


def export_covariance(folder: Path) -> None:
    """Estimate the covariance C of the exported text tower over captions of the mini world, and write it."""
    weights, settings = folder / "model.safetensors", folder / "text_encoder"
    if not weights.is_file():
        raise UserError(f"{weights}: there is no text tower; export that of a run first (export.py text2img RUN)")
    length = CLIPTextConfig.from_pretrained(settings).max_position_embeddings
    encoder = FrozenCLIPEmbedder(str(settings.resolve()), max_length=length)
    stage = "cond_stage_model."
    encoder.load_state_dict({key.removeprefix(stage): value for key, value in read_state_dict(weights).items()
                             if key.startswith(stage)})
    estimate = estimate_covariance(encoder, world_captions())
    save_covariance(folder / "covariance.safetensors", estimate.covariance, source="captions of ldm.data.mini.scenes",
                    captions=estimate.captions, tokens="words", encoder=encoder_fingerprint(encoder))


EXPORTS: dict[str, Callable[[Path, Path], None]] = {
    "autoencoder": export_autoencoder, "decoder": export_decoder, "clip": export_clip,
    "evaluation_clip": export_evaluation_clip, "text2img": export_text2img, "segmenter": export_segmenter,
    "encoder": export_encoder}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("part", choices=[*EXPORTS, "covariance"], help="which of the mini models the run trained")
    parser.add_argument("run", type=user_path, nargs="?", help="log folder of that run; not needed for the covariance")
    parser.add_argument("--outdir", type=user_path, default=MINI, metavar="FOLDER",
                        help="folder of the models (default: models/mini)")
    options = parser.parse_args(arguments)
    check_folder("--outdir", options.outdir)
    if options.part == "covariance":
        export_covariance(options.outdir)
    elif options.run is None:
        raise UserError(f"{options.part}: name the log folder of its run; see --help")
    else:
        EXPORTS[options.part](options.run, options.outdir)
        record_run(options.outdir / "training.json", options.part, options.run)
    for path in sorted(options.outdir.rglob("*.safetensors")):
        log.info("%s: %.1f MB", path.relative_to(options.outdir), path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
