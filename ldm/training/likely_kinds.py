"""Name the kinds of subject that photos look like, for a user who has not said it, by a CLIP on this machine.

Nothing is guessed: the user chooses. No run that knows its super-category loads any of this.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT, resolve_path
from ldm.inference.model_config import inference_defaults

MINI = PROJECT_ROOT / "models" / "mini"  # models that know the kinds of the mini world only
BESIDE_MODEL = "clip"
COUNT = 3
TEMPLATE = "a photo of a {}"
EXAMPLE = '--init_word "teddy bear"'


def ask_for_super_category(config: DictConfig) -> UserError:
    """Return the error for a run without a super-category: it names the three likeliest kinds if a CLIP is at hand."""
    photos = OmegaConf.select(config, "data.params.train.params.data_root")  # None for one that is missing, too
    kinds = likely_kinds(photos, config) if isinstance(photos, str) else []
    if not kinds:
        return UserError(f"no super-category: say what kind of subject it is, for example {EXAMPLE}")
    return UserError(f"no super-category: the photos look like {', '.join(kinds[:-1])} or {kinds[-1]}; give one, for "
                     f'example --init_word "{kinds[0]}"')


def likely_kinds(photos: str | Path, config: DictConfig) -> list[str]:
    """Return the three kinds that photos look most like; none without a CLIP on this machine.

    Args:
        photos: folder of the subject's photos.
        config: the run's config.

    Raises:
        UserError: the photos cannot be read.
    """
    folder = clip_at_hand(config)
    if folder is None:
        return []
    # These load torch.
    import torch

    from ldm.data.images import crop_square, load_folder, to_tensor
    from ldm.models.clip_encoder import ClipEncoder

    kinds = kinds_known_to(folder)
    clip = ClipEncoder.from_path(folder)
    images = torch.stack([to_tensor(crop_square(photo, clip.image_size)) for _, photo in load_folder(photos)])
    texts = clip.embed_texts([TEMPLATE.format(kind) for kind in kinds])
    likeness = (clip.embed_images(images) @ texts.T).mean(0)
    return [kinds[index] for index in likeness.topk(COUNT).indices.tolist()]


def clip_at_hand(config: DictConfig) -> Path | None:
    """Return the folder of a CLIP: that beside the base model, or the one that the section `inference` names.

    A download is too much for a question, so None is returned for a CLIP that is not on this machine.
    """
    checkpoint = OmegaConf.select(config, "model.params.ckpt_path")
    beside = [resolve_path(checkpoint).parent / BESIDE_MODEL] if isinstance(checkpoint, str) else []
    named = inference_defaults(config).evaluation_clip
    folders = [*beside, *([] if named is None else [resolve_path(named)])]
    return next((folder for folder in folders if folder.is_dir()), None)


def kinds_known_to(clip: Path) -> Sequence[str]:
    """Return the kinds to choose among: those of the mini world for its own CLIPs, everyday ones for all others."""
    if MINI.resolve() in clip.resolve().parents:
        from ldm.data.mini.world import KIND_NAMES

        return KIND_NAMES
    from ldm.data.kinds import EVERYDAY_KINDS

    return EVERYDAY_KINDS
