"""Generate images of the bundled model with diffusers, with concepts in the prompt.

    python scripts/mini/diffusers_pipeline.py --concept logs/.../concept.safetensors \
        --prompt "a photo of a <my-teddy> on the beach"

The U-Net, the text encoder and the schedule become diffusers' own; the first stage, which folds pixels as none of
diffusers does, keeps its class behind the interface of `AutoencoderKL`. See docs/diffusers.md.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.models.autoencoders.vae import DecoderOutput  # noqa: E402
from diffusers.models.modeling_outputs import AutoencoderKLOutput  # noqa: E402
from torch import Generator, Tensor, nn  # noqa: E402

from ldm.checkpoints.diffusers_names import unet_tensors  # noqa: E402
from ldm.cli.parser import Parser, int_in_range  # noqa: E402
from ldm.common.atomic_write import write_atomically  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.common.paths import PROJECT_ROOT, check_folder, user_path  # noqa: E402
from ldm.inference import PerfusionPipeline  # noqa: E402
from ldm.integrations.diffusers import load_concepts  # noqa: E402
from scripts.benchmarks.baselines import unet_settings  # noqa: E402

log = logging.getLogger(__name__)

MINI = PROJECT_ROOT / "models" / "mini"


class FoldingAutoencoder(ModelMixin, ConfigMixin):
    """The first stage of the bundled model, with the interface that pipelines expect of a first stage.

    Args:
        block_out_channels: as many entries as the autoencoder of diffusers would have for this downsampling factor.
        scaling_factor: of the latents.
        latent_channels: their channels.
        force_upcast: always False: it does not overflow.
    """

    @register_to_config
    def __init__(self, block_out_channels: Sequence[int] = (64, 64, 64), scaling_factor: float = 1.0,
                 latent_channels: int = 8, force_upcast: bool = False) -> None:
        super().__init__()
        self.first_stage: Any = nn.Identity()

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        posterior = self.first_stage.encode(images)
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(self, latents: Tensor, return_dict: bool = True, **_: Any) -> Any:
        images = self.first_stage.decode(latents)
        return DecoderOutput(images) if return_dict else (images,)


def mini_pipeline() -> StableDiffusionPipeline:
    """Return the bundled model as a pipeline of diffusers, on the CPU."""
    own = PerfusionPipeline.from_pretrained(MINI, device="cpu")
    model, encoder = own.model, own.model.cond_stage_model
    scheduler = DDIMScheduler(trained_betas=model.betas.numpy(), prediction_type="v_prediction", clip_sample=False,
                              steps_offset=1, timestep_spacing="leading", set_alpha_to_one=False)
    autoencoder = FoldingAutoencoder(scaling_factor=float(model.scale_factor))
    autoencoder.first_stage = model.first_stage_model
    tokenizer = encoder.tokenizer
    tokenizer.model_max_length = encoder.max_length
    pipe = StableDiffusionPipeline(vae=autoencoder, text_encoder=encoder.transformer, tokenizer=tokenizer,
                                   unet=_convert_unet(model.model.diffusion_model, own.config.model.params),
                                   scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    pipe.register_to_config(_name_or_path=str(MINI))
    return pipe


def _convert_unet(unet: nn.Module, params: Any) -> UNet2DConditionModel:
    """Return the U-Net of diffusers with the weights of ours."""
    converted = UNet2DConditionModel(**unet_settings(params.unet_config.params), sample_size=params.image_size)
    names = unet_tensors({key: key for key in converted.state_dict()})  # our name -> theirs
    own = unet.state_dict()
    converted.load_state_dict({theirs: own[ours] for ours, theirs in names.items()})
    return converted.eval().requires_grad_(False)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--concept", action="append", required=True, metavar="FILE", help="concept file; repeatable")
    parser.add_argument("--prompt", required=True, help="the prompt")
    parser.add_argument("--seed", type=int_in_range(0), default=1, help="seed of the first image (default: 1)")
    parser.add_argument("--n_samples", type=int_in_range(1), default=4, metavar="N", help="number of images")
    parser.add_argument("--steps", type=int_in_range(1), default=50, help="sampling steps (default: 50)")
    parser.add_argument("--scale", type=float, default=2.0, help="guidance scale (default: 2)")
    parser.add_argument("--outdir", type=user_path, default="outputs/diffusers", metavar="FOLDER",
                        help="folder of the images (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_folder("--outdir", Path(options.outdir))
    pipe = mini_pipeline()
    load_concepts(pipe, options.concept, covariance=MINI / "covariance.safetensors")
    seeds = range(options.seed, options.seed + options.n_samples)
    images = pipe(options.prompt, num_images_per_prompt=options.n_samples, num_inference_steps=options.steps,
                  guidance_scale=options.scale, generator=[Generator().manual_seed(seed) for seed in seeds]).images
    for seed, image in zip(seeds, images, strict=True):
        file = Path(options.outdir) / f"{seed}.png"
        write_atomically(file, lambda temporary, image=image: image.save(temporary, "PNG"))
        log.info("%s", file)


if __name__ == "__main__":
    main()
