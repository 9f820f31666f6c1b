"""Turns the checkpoints of the mini models' training runs into the files that ship in `models/mini/`.

    python scripts/mini/export.py autoencoder logs/..._autoencoder
    python scripts/mini/export.py decoder logs/..._decoder
    python scripts/mini/export.py clip logs/..._clip
    python scripts/mini/export.py evaluation_clip logs/..._evaluation_clip
    python scripts/mini/export.py text2img logs/..._text2img
    python scripts/mini/export.py covariance
    python scripts/mini/export.py segmenter logs/..._segmenter

In this order: the later ones are trained with what the earlier ones exported; `scripts/mini/rebuild.py` does it all.
Numbers are stored in half precision, averaged weights where a run kept averages, and word tables without the rows of
words that no caption used. How each part was trained goes into `training.json` beside the weights.
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

from ldm.checkpoints.diffusers_names import clip_text_tensors  # noqa: E402
from ldm.checkpoints.load import AVERAGES, moving_averages, read_state_dict  # noqa: E402
from ldm.checkpoints.packed_tables import pack_table  # noqa: E402
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.files import save_tensors, write_atomically  # noqa: E402
from ldm.common.paths import check_folder  # noqa: E402
from ldm.data.mini.scenes import SceneDataset  # noqa: E402
from ldm.models.clip_images import CLIP_MEAN, CLIP_STD  # noqa: E402
from ldm.models.mini.openclip import OpenCLIPTrainer  # noqa: E402
from ldm.models.open_clip_folder import SETTINGS  # noqa: E402
from ldm.modules.covariance import encoder_fingerprint, estimate_covariance, save_covariance  # noqa: E402
from ldm.modules.encoders.clip import special_tokens  # noqa: E402
from ldm.modules.encoders.modules import TOKENIZER, FrozenCLIPEmbedder  # noqa: E402
from ldm.modules.residual_segmenter import ResidualSegmenter  # noqa: E402
from ldm.training.run_record import newest_config, record_run  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402

log = logging.getLogger(__name__)

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
PARTS = "parts"  # folder of what only training needs; not kept with the project
CAPTIONS = 20_000


def last_checkpoint(run: Path) -> tuple[dict[str, Tensor], OmegaConf]:
    """The newest weights of a training run, and its config."""
    config = newest_config(run, "project")
    return read_state_dict(run / "checkpoints" / "last.ckpt"), config


def trained(run: Path, **params: Any) -> torch.nn.Module:
    """The model of a run with its newest weights; `params` are set in its config."""
    tensors, config = last_checkpoint(run)
    config.model.params.update(params)
    model = instantiate_from_config({key: config.model[key] for key in ("target", "params")})
    model.load_state_dict(tensors)
    return model


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in half precision; what has no dot in its name is the noise schedule, which would suffer."""
    return {key: value.half() if "." in key and value.is_floating_point() else value for key, value in tensors.items()}


@functools.cache
def captions_of_the_world(count: int = CAPTIONS) -> tuple[str, ...]:
    """Distinct captions of scenes, sorted; nothing is drawn for them."""
    scenes = SceneDataset(seed=2)
    return tuple(sorted({scenes.plan(index).caption for index in range(count)}))


def words_in_use(tokenizer: object) -> Tensor:
    """Numbers of the word pieces in the captions of the mini world."""
    captions = list(captions_of_the_world())
    return torch.tensor(sorted({piece for row in tokenizer(captions)["input_ids"] for piece in row}))


def pack_words(tensors: dict[str, Tensor], tokenizer: object) -> dict[str, Tensor]:
    """The same tensors with every word table packed."""
    used = words_in_use(tokenizer)
    packed = {}
    for key, value in tensors.items():
        packed |= pack_table(key, value, used) if key.endswith("token_embedding.weight") else {key: value}
    return packed


@torch.no_grad()
def export_autoencoder(run: Path, folder: Path) -> None:
    """The first stage with its latents shifted and scaled to mean 0 and variance 1 in every channel."""
    model = trained(run).eval()
    scenes = SceneDataset(seed=4)
    latents = torch.cat([model.encode(torch.stack([scenes[start + i]["image"] for i in range(64)])).sample()
                         for start in range(0, 2048, 64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    log.info("channel means %.2f to %.2f, deviations %.2f to %.2f", mean.min(), mean.max(), std.min(), std.max())
    fold_normalisation(model, mean, std)
    save_tensors(folder / PARTS / "autoencoder.safetensors", model.state_dict(), {"run": run.name})


def export_decoder(run: Path, folder: Path) -> None:
    """The same first stage with a decoder that was trained on; its latents are those that models have learned."""
    tensors, _ = last_checkpoint(run)
    refuse_other_latents(run, tensors, read_state_dict(folder / PARTS / "autoencoder.safetensors"))
    save_tensors(folder / PARTS / "autoencoder.safetensors", tensors, {"run": run.name})


def refuse_other_latents(run: Path, tensors: dict[str, Tensor], exported: dict[str, Tensor]) -> None:
    """Raises a UserError where two first stages differ in what makes latents."""
    encoders = [{key: value for key, value in stage.items() if key.startswith(("encoder.", "quant_conv."))}
                for stage in (tensors, exported)]
    if encoders[0].keys() != encoders[1].keys() or not all(
            torch.equal(value, encoders[1][key]) for key, value in encoders[0].items()):
        raise UserError(f"{run}: its latents are not those of the exported autoencoder; export the one it began with")


def fold_normalisation(model: torch.nn.Module, mean: Tensor, std: Tensor) -> None:
    """Makes (z - mean) / std the new latent, by the 1x1 convolutions on either side of it."""
    before, after, z = model.quant_conv, model.post_quant_conv, len(mean)
    before.weight[:z] /= std[:, None, None, None]
    before.bias[:z].sub_(mean).div_(std)
    before.bias[z:] -= 2 * std.log()  # the second half are logarithms of variances
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[:, None, None]


def export_clip(run: Path, folder: Path) -> None:
    """The whole CLIP for `open_clip`, and its text tower alone, for `transformers`, to train the U-Net with."""
    model = trained(run)
    write_openclip(folder / "clip", model, {"format": "pt", "run": run.name})
    config = text_settings(model)
    tensors = clip_text_tensors(model.clip.state_dict(), CLIPTextModel(config).state_dict())
    background = folder / PARTS / "text_encoder"
    save_tensors(background / "model.safetensors", half(pack_words(tensors, model.tokenizer)),
                 {"format": "pt", "run": run.name})
    config.save_pretrained(background)


def text_settings(model: OpenCLIPTrainer) -> CLIPTextConfig:
    """How `transformers` describes the text tower of a CLIP of `open_clip`'s."""
    tower = model.settings["text_cfg"]
    return CLIPTextConfig(
        hidden_size=tower["width"], intermediate_size=4 * tower["width"], num_hidden_layers=tower["layers"],
        num_attention_heads=tower["heads"], max_position_embeddings=tower["context_length"],
        projection_dim=model.settings["embed_dim"], hidden_act="gelu", **special_tokens(model.tokenizer))


def export_evaluation_clip(run: Path, folder: Path) -> None:
    """The second CLIP, for `open_clip`."""
    write_openclip(folder / "evaluation_clip", trained(run), {"format": "pt", "run": run.name})


def write_openclip(folder: Path, model: OpenCLIPTrainer, metadata: dict[str, str]) -> None:
    """Weights and settings in the layout that `open_clip` calls local-dir, but for the packed word table."""
    settings = {"model_cfg": model.settings, "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}
    save_tensors(folder / "model.safetensors", half(pack_words(model.clip.state_dict(), model.tokenizer)), metadata)
    write_json(folder / SETTINGS, settings)


def write_json(path: Path, settings: dict[str, Any]) -> None:
    write_atomically(path, lambda bind_attributes: bind_attributes.write_text(json.dumps(settings, indent=1) + "\n"))


def export_text2img(run: Path, folder: Path) -> None:
    """One checkpoint as Stable Diffusion's are: averaged U-Net, text tower, and the first stage as last exported."""
    tensors, config = last_checkpoint(run)
    stage = "first_stage_model."
    newest = read_state_dict(folder / PARTS / "autoencoder.safetensors")
    refuse_other_latents(run, {key.removeprefix(stage): value for key, value in tensors.items()
                               if key.startswith(stage)}, newest)
    tensors |= {stage + key: value for key, value in newest.items()}
    whole = {key: value for key, value in (tensors | moving_averages(tensors)).items() if not key.startswith(AVERAGES)}
    packed = half(pack_words(whole, CLIPTokenizer.from_pretrained(TOKENIZER)))
    save_tensors(folder / "model.safetensors", packed, {"format": "pt", "run": run.name})
    settings = config.model.params.cond_stage_config.params.version
    CLIPTextConfig.from_pretrained(settings).save_pretrained(folder / "text_encoder")


def export_segmenter(run: Path, folder: Path) -> None:
    """The segmenter as `ldm.modules.segmentation` loads it."""
    model = trained(run, clip=str(folder / "clip"))  # its settings; a run's own path may lead elsewhere by now
    background, segmenter = folder / "segmenter", model.segmenter
    save_tensors(background / "model.safetensors", half(pack_words(segmenter.state_dict(), model.tokenizer)),
                 {"format": "pt", "run": run.name})
    side = segmenter.config["vision_cfg"]["image_size"]
    write_json(background / "config.json", {"model_type": ResidualSegmenter.model_type, **segmenter.config})
    write_json(background / "preprocessor_config.json", {"size": {"height": side, "width": side}, "resample": 3,
                                                    "image_mean": CLIP_MEAN, "image_std": CLIP_STD})


def export_covariance(folder: Path) -> None:
    """C of the exported model's text tower, over captions of the mini world."""
    weights, settings = folder / "model.safetensors", folder / "text_encoder"
    if not weights.is_file():
        raise UserError(f"{weights}: there is no text tower; export that of a run first (export_mini.py text2img RUN)")
    length = CLIPTextConfig.from_pretrained(settings).max_position_embeddings
    encoder = FrozenCLIPEmbedder(str(settings.resolve()), max_length=length)
    stage = "cond_stage_model."
    encoder.load_state_dict({key.removeprefix(stage): value for key, value in read_state_dict(weights).items()
                             if key.startswith(stage)})
    estimate = estimate_covariance(encoder, captions_of_the_world())
    save_covariance(folder / "covariance.safetensors", estimate.covariance, source="captions of ldm.data.mini.scenes",
                    captions=estimate.captions, tokens="words", encoder=encoder_fingerprint(encoder))


EXPORTS: dict[str, Callable[[Path, Path], None]] = {
    "autoencoder": export_autoencoder, "decoder": export_decoder, "clip": export_clip,
    "evaluation_clip": export_evaluation_clip, "text2img": export_text2img, "segmenter": export_segmenter}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("part", choices=[*EXPORTS, "covariance"], help="which of the mini models the run trained")
    parser.add_argument("run", type=Path, nargs="?", help="log folder of that run; not needed for the covariance")
    parser.add_argument("--outdir", type=Path, default=MINI, metavar="FOLDER",
                        help="where the models lie (default: models/mini)")
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
