"""Runs of public scripts that train, for a few steps, and of what is built on them.

Pictures of captions, whose names begin with c, are not compared: the packages draw them in different fonts.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from public_scripts.checkpoints import (
    COMPVIS_LDM,
    COMPVIS_SD,
    CUSTOM,
    INVERSION,
    MODELS,
    PIX2PIX,
    TinyModel,
    config,
    photo,
    public,
    text,
    weights,
)
from public_scripts.run import Input, PublicRun, Workplace

HERE = Path(__file__).parent
DREAMBOOTH, CONTROLNET = "XavierXiao--Dreambooth-Stable-Diffusion", "lllyasviel--ControlNet"
CHEN = "ChenDarYen--Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization"
CELEB_BASIS = "ygtxr1997--CelebBasis"
LIGHTNING = ("public_scripts.lightning_names:install",)
SMALL = {"image_size": 8}  # of the latents that log_images samples
NEW_MODELS = {
    "train-inversion-sd1": TinyModel(f"{INVERSION}/configs/stable-diffusion/v1-finetune.yaml", (INVERSION,), SMALL),
    "train-inversion-style": TinyModel(f"{INVERSION}/configs/latent-diffusion/txt2img-1p4B-finetune_style.yaml",
                                       (INVERSION,), SMALL),
    "train-inversion-text2img": TinyModel(f"{INVERSION}/configs/latent-diffusion/txt2img-1p4B-finetune.yaml",
                                          (INVERSION,), SMALL),
    "train-inversion-unfrozen": TinyModel(f"{INVERSION}/configs/stable-diffusion/v1-finetune_unfrozen.yaml",
                                          (INVERSION,), SMALL),
    "train-dreambooth": TinyModel(f"{DREAMBOOTH}/configs/stable-diffusion/v1-finetune_unfrozen.yaml", (DREAMBOOTH,),
                                  SMALL),
    "controlnet": TinyModel(f"{CONTROLNET}/models/cldm_v15.yaml", (CONTROLNET,), {
        "control_stage_config.params.model_channels": 32, "control_stage_config.params.num_res_blocks": 1,
        "control_stage_config.params.channel_mult": [1, 2, 2, 2], "control_stage_config.params.context_dim": 32,
        "control_stage_config.params.use_checkpoint": False}),
    "train-pix2pix": TinyModel(f"{PIX2PIX}/configs/train.yaml", (f"{PIX2PIX}/stable_diffusion", PIX2PIX),
                               {**SMALL, "ckpt_path": None}),
}
MODELS.update(NEW_MODELS)


def photos(folder: str, count: int = 4, seed: int = 0) -> dict[str, Input]:
    """Return the inputs of a folder of photos that are not square."""
    return {f"{folder}/{number}.png": photo(80, 64, seed + number) for number in range(count)}


def small_data(section: DictConfig) -> None:
    """Shrink the data of a config, and let every step save images."""
    data = section.data.params
    data.batch_size, data.num_workers = 2, 0
    for name in ("train", "reg", "validation"):
        if name in data and "size" in data[name].get("params", {}):
            data[name].params.size = 64
    section.lightning = OmegaConf.merge(section.get("lightning") or {}, {"callbacks": {"image_logger": {
        "target": "main.ImageLogger", "params": {
            "batch_frequency": 1, "max_images": 4, "increase_log_steps": False,
            "log_images_kwargs": {"ddim_steps": 4, "inpaint": False, "plot_progressive_rows": False,
                                  "plot_diffusion_rows": False}}}}})


def inversion_run(name: str, model: str, *flags: str) -> PublicRun:
    """Return a run of Textual Inversion's main.py with the flags of its README."""
    arguments = ("--base", "finetune.yaml", "-t", "--actual_resume", "model.ckpt", "-n", "run", "--gpus", "0,",
                 "--data_root", "photos", *flags, "--init_word", "toy", "--no-test")
    inputs = {"model.ckpt": weights(model), "finetune.yaml": config(model, small_data), **photos("photos")}
    return PublicRun(name, INVERSION, "main.py", arguments, inputs, images="logs/**/[!c]*.png", stand_ins=LIGHTNING)


INVERSION_RUNS = (
    inversion_run("train-ti-text2img", "train-inversion-text2img"),
    inversion_run("train-ti-style", "train-inversion-style", "--max_steps", "2"),
    inversion_run("train-ti-sd1", "train-inversion-sd1"),
    inversion_run("train-ti-sd1-regularized", "train-inversion-sd1", "model.params.embedding_reg_weight=0.1"),
    inversion_run("train-ti-sd1-unfrozen", "train-inversion-unfrozen"),
    PublicRun("train-dreambooth", DREAMBOOTH, "main.py", (
        "--base", "finetune.yaml", "-t", "--actual_resume", "model.ckpt", "-n", "run", "--gpus", "0,", "--no-test",
        "--data_root", "photos", "--reg_data_root", "dogs", "--class_word", "dog"),
        {"model.ckpt": weights("train-dreambooth"), "finetune.yaml": config("train-dreambooth", small_data),
         **photos("photos"), **photos("dogs", seed=10)}, images="logs/**/[!c]*.png", stand_ins=LIGHTNING),
)


def tiny_photos(side: int = 64) -> DictConfig:
    """Return the data section of LDM's main.py for a list of images."""
    images = {"target": "ldm.data.lsun.LSUNBase",
              "params": {"txt_file": "images.txt", "data_root": "photos", "size": side}}
    return OmegaConf.create({"target": "main.DataModuleFromConfig", "params": {
        "batch_size": 2, "num_workers": 0, "wrap": True, "train": images, "validation": images}})


def base_model(section: DictConfig) -> None:
    """Make a config one of training a base model on photos, from the weights of `model.ckpt`."""
    section.data = tiny_photos()
    section.model.base_learning_rate = 1e-4
    section.model.params.ckpt_path = "model.ckpt"
    small_data(section)


def text_model(section: DictConfig) -> None:
    """As `base_model`, on photos with captions."""
    base_model(section)
    section.model.params.update({"first_stage_key": "image", "cond_stage_key": "caption", "image_size": 8})
    section.data.params.train = {"target": "public_scripts.captioned_photos.CaptionedPhotos",
                                 "params": {"folder": "photos"}}
    section.data.params.validation = section.data.params.train


def base_model_run(name: str, model: str, repository: str, change: Callable[[DictConfig], None]) -> PublicRun:
    """Return a run of latent-diffusion's or Stable Diffusion's main.py."""
    names = "".join(f"{number}.png\n" for number in range(4))
    inputs = {"model.ckpt": weights(model), "train.yaml": config(model, change), "images.txt": text(names),
              **photos("photos")}
    # Images of validation come after losses of averaged weights, for which our models repeat the first loss's noise.
    return PublicRun(name, repository, "main.py", ("--base", "train.yaml", "-t", "--gpus", "0,", "--no-test"), inputs,
                     images="logs/**/train/[!c]*.png", stand_ins=LIGHTNING)


BASE_MODEL_RUNS = (
    base_model_run("train-ldm-unconditional", "celeba", COMPVIS_LDM, base_model),
    base_model_run("train-sd1", "sd1", COMPVIS_SD, text_model),
)


def pairs(place: Workplace, target: Path) -> None:
    """Write ControlNet's data set of two pairs: a list of JSON objects, one a line, and images."""
    target.write_text("\n".join(json.dumps({
        "source": f"source{number}.png", "target": f"target{number}.png", "prompt": f"a circle {number}"})
        for number in range(4)))
    for number in range(4):
        photo(64, 64, number)(place, target.with_name(f"source{number}.png"))
        photo(64, 64, 10 + number)(place, target.with_name(f"target{number}.png"))


CONTROL_FILES = {"models/cldm_v15.yaml": config("controlnet"), "models/control_sd15_ini.ckpt": weights("controlnet"),
                 "font": public(f"{CONTROLNET}/font")}
CONTROL_RUNS = (
    PublicRun("train-controlnet", CONTROLNET, "tutorial_train.py", (),
              {**CONTROL_FILES, "training/fill50k/prompt.json": pairs}, images="**/image_log/**/*.png",
              stand_ins=LIGHTNING),
    PublicRun("controlnet-sampler", CONTROLNET, str(HERE / "controlnet_sampler.py"), (), CONTROL_FILES,
              images="sample*.png"),
    PublicRun("controlnet-sampler-sliced", CONTROLNET, str(HERE / "controlnet_sampler.py"), ("hack",), CONTROL_FILES,
              images="sample*.png", transformers4=True),
)


def custom_data(section: DictConfig) -> None:
    """Shrink the data of Custom Diffusion's config."""
    section.data.params.update({"batch_size": 2, "num_workers": 0})
    section.data.params.train.params.size = section.data.params.train2.params.size = 64
    section.lightning.callbacks.image_logger.params.batch_frequency = 1000


CUSTOM_RUNS = (
    PublicRun("train-custom-diffusion", CUSTOM, "train.py", (
        "--base", "train.yaml", "-t", "--gpus", "0,", "--resume-from-checkpoint-custom", "model.ckpt",
        "--datapath", "photos", "--caption", "<new1> toy", "--reg_datapath", "toys", "--reg_caption", "toy",
        "--no-test", "--modifier_token", "<new1>"),
        {"model.ckpt": weights("sd1-768"), "train.yaml": config("custom", custom_data), **photos("photos"),
         **photos("toys", seed=10)}, ldm=f"{COMPVIS_SD}/", images="logs/**/[!c]*.png", stand_ins=LIGHTNING,
        clip_width=768, transformers4=True),
)


def edits(place: Workplace, target: Path) -> None:
    """Write a data set of instruct-pix2pix with pairs of images and a prompt in each folder."""
    names = [[f"pair{number}", [1]] for number in range(40)]
    target.write_text(json.dumps(names))
    for number, (name, _) in enumerate(names):
        folder = target.with_name(name)
        folder.mkdir()
        (folder / "prompt.json").write_text(json.dumps({"edit": f"make it blue {number}"}))
        for which in (0, 1):
            photo(64, 64, 2 * number + which)(place, folder / f"1_{which}.jpg")


def edit_data(section: DictConfig) -> None:
    """Shrink the data of instruct-pix2pix's config.

    At 64 pixels the U-Net's inner normalizations see 1x1 values and amplify rounding errors in gradients.
    """
    section.model.params.ckpt_path = "model.ckpt"
    section.data.params.update({"batch_size": 2, "num_workers": 1})
    for name in ("train", "validation"):
        section.data.params[name].params.update({"path": "edits", "min_resize_res": 128, "max_resize_res": 128,
                                                 "crop_res": 128})
    section.lightning.trainer.accumulate_grad_batches = 1


PIX2PIX_RUNS = (
    PublicRun("train-instruct-pix2pix", PIX2PIX, "main.py",
              ("--name", "run", "--base", "train.yaml", "--train", "--gpus", "0,", "--no-test"),
              {"model.ckpt": weights("train-pix2pix"), "train.yaml": config("train-pix2pix", edit_data),
               "edits/seeds.json": edits}, ldm="stable_diffusion", images="logs/**/[!c]*.png", stand_ins=LIGHTNING),
)


def imports(name: str, repository: str, *modules: str, **options: Any) -> PublicRun:
    """Return a run that imports modules of a repository."""
    return PublicRun(f"import-{name}", repository, str(HERE / "import_modules.py"), modules, images="none",
                     stand_ins=LIGHTNING, **options)


IMPORT_RUNS = (
    imports("cldm", CONTROLNET, "cldm.cldm", "cldm.ddim_hacked", "cldm.hack", "cldm.logger", "cldm.model"),
    imports("custom-diffusion", CUSTOM, "train", "src.model", "src.custom_modules", ldm=f"{COMPVIS_SD}/"),
    imports("perfusion", CHEN, "perfusion.perfusion", "perfusion.dataset", "perfusion.embedding_manager",
            "perfusion.roe_openaimodel", "main"),
    imports("celeb-basis", CELEB_BASIS, "main", "main_id_embed"),
    imports("ldm-main", COMPVIS_LDM, "main"),
    imports("sd-main", COMPVIS_SD, "main"),
)
RUNS = (*INVERSION_RUNS, *BASE_MODEL_RUNS, *CONTROL_RUNS, *CUSTOM_RUNS, *PIX2PIX_RUNS, *IMPORT_RUNS)
