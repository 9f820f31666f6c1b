"""Runs of public scripts that generate images."""
from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from public_scripts.checkpoints import config, mask, photo, weights
from public_scripts.embeddings import delta, embedding
from public_scripts.repositories import (
    COMPVIS_LDM,
    COMPVIS_SD,
    CUSTOM,
    DREAMBOOTH,
    INVERSION,
    K_DIFFUSION,
    PIX2PIX,
    RUNWAY,
    STABILITY,
)
from public_scripts.run import Input, PublicRun

HERE = Path(__file__).parent
PROMPT = ("--prompt", "a photo of a cat beside a red car")
SIZE = ("--H", "64", "--W", "64", "--n_samples", "2")
MODEL = ("--config", "config.yaml", "--ckpt", "model.ckpt", "--outdir", "out")


def model_files(name: str) -> dict[str, Input]:
    """Return the inputs that scripts with --config and --ckpt read."""
    return {"model.ckpt": weights(name), "config.yaml": config(name)}


def sd_run(name: str, *flags: str, repository: str = COMPVIS_SD) -> PublicRun:
    """Return a run of a txt2img.py of Stable Diffusion 1, with two batches."""
    return PublicRun(name, repository, "scripts/txt2img.py", (*PROMPT, *MODEL, *SIZE, "--n_iter", "2", *flags),
                     model_files("sd1"))


def sd_img2img(name: str, repository: str = COMPVIS_SD) -> PublicRun:
    arguments = (*PROMPT, *MODEL, "--n_samples", "2", "--ddim_steps", "10", "--strength", "0.6",
                 "--init-img", "photo.png")
    return PublicRun(name, repository, "scripts/img2img.py", arguments,
                     {**model_files("sd1"), "photo.png": photo()}, images="out/**/*.png")


STABLE_DIFFUSION = (
    sd_run("sd-txt2img-ddim", "--ddim_steps", "10"),
    sd_run("sd-txt2img-ddim-30", "--ddim_steps", "30"),
    sd_run("sd-txt2img-ddim-eta-fixed-code", "--ddim_steps", "7", "--ddim_eta", "0.5", "--fixed_code"),
    sd_run("sd-txt2img-plms", "--ddim_steps", "10", "--plms"),
    sd_run("sd-txt2img-dpm", "--ddim_steps", "10", "--dpm_solver"),
    sd_run("sd-txt2img-dpm-20", "--ddim_steps", "20", "--dpm_solver"),
    sd_img2img("sd-img2img"),
    sd_run("runwayml-txt2img-ddim", "--ddim_steps", "10", repository=RUNWAY),
    sd_run("runwayml-txt2img-plms", "--ddim_steps", "10", "--plms", repository=RUNWAY),
    sd_img2img("runwayml-img2img", repository=RUNWAY),
    PublicRun("runwayml-inpaint", RUNWAY, str(HERE / "inpaint_streamlit.py"), ("config.yaml", "model.ckpt"),
              {**model_files("sd1-inpainting"), "photo.png": photo(), "mask.png": mask()}, images="out*.png",
              extra_path=(f"{RUNWAY}/scripts",), stand_ins=("public_scripts.stand_ins:safety_checker",)),
)


def text2img_run(name: str, *flags: str) -> PublicRun:
    """Return a run of LDM's txt2img.py, which has no flags for its model and sets no seed."""
    return PublicRun(name, COMPVIS_LDM, "scripts/txt2img.py",
                     (*PROMPT, *SIZE, "--outdir", "out", "--n_iter", "2", *flags),
                     {"configs/latent-diffusion/txt2img-1p4B-eval.yaml": config("text2img"),
                      "models/ldm/text2img-large/model.ckpt": weights("text2img")})


def unconditional_run(name: str, model: str, *flags: str) -> PublicRun:
    return PublicRun(name, COMPVIS_LDM, "scripts/sample_diffusion.py",
                     ("-r", "run/model.ckpt", "-n", "4", "--batch_size", "2", *flags),
                     {"run/model.ckpt": weights(model), "run/config.yaml": config(model)})


INPAINTING = {"models/ldm/inpainting_big/config.yaml": config("inpainting"),
              "models/ldm/inpainting_big/last.ckpt": weights("inpainting"),
              "pairs/one.png": photo(), "pairs/one_mask.png": mask(),
              "pairs/two.png": photo(seed=1), "pairs/two_mask.png": mask()}
INPAINTING_FLAGS = ("--indir", "pairs", "--outdir", "out", "--steps", "10")
LATENT_DIFFUSION = (
    text2img_run("ldm-txt2img-ddim", "--ddim_steps", "10"),
    text2img_run("ldm-txt2img-plms", "--ddim_steps", "10", "--plms"),
    unconditional_run("ldm-sample-ddim", "celeba", "-c", "10", "-e", "1.0"),
    unconditional_run("ldm-sample-vanilla", "celeba-20", "-v"),
    PublicRun("ldm-inpaint", COMPVIS_LDM, "scripts/inpaint.py", INPAINTING_FLAGS, INPAINTING, images="out/*.png"),
    PublicRun("ldm-inpaint-our-main", COMPVIS_LDM, "scripts/inpaint.py", INPAINTING_FLAGS, INPAINTING,
              images="out/*.png", whole_checkout=True),
    PublicRun("ldm-class-notebook", COMPVIS_LDM, "scripts/latent_imagenet_diffusion.ipynb", (),
              {"configs/latent-diffusion/cin256-v2.yaml": config("class-conditional"),
               "models/ldm/cin256-v2/model.ckpt": weights("class-conditional")}),
)


def stability_run(name: str, model: str, *flags: str) -> PublicRun:
    """Return a run of Stability's txt2img.py; at its default precision it would compute in bfloat16 on a CPU."""
    arguments = (*PROMPT, *MODEL, *SIZE, "--n_iter", "2", "--steps", "10", "--precision", "full", *flags)
    bug = "the original's PLMS reads the model's v as noise" if name == "stability-txt2img-plms-v" else ""
    return PublicRun(name, STABILITY, "scripts/txt2img.py", arguments, model_files(model), stand_ins=OPEN_CLIP,
                     original_differs=bug)


OPEN_CLIP = ("public_scripts.towers:register_open_clip",)
STABLE_DIFFUSION_2 = (
    *(stability_run(f"stability-txt2img-{sampler}-{kind}", model, *flags)
      for model, kind in (("sd2", "eps"), ("sd2-v", "v"))
      for sampler, flags in (("ddim", ()), ("plms", ("--plms",)), ("dpm", ("--dpm",)))),
    *(PublicRun(f"stability-img2img-{kind}", STABILITY, "scripts/img2img.py",
                (*PROMPT, *MODEL, "--n_samples", "2", "--ddim_steps", "10", "--init-img", "photo.png"),
                {**model_files(model), "photo.png": photo()}, images="out/**/*.png", stand_ins=OPEN_CLIP)
      for model, kind in (("sd2", "eps"), ("sd2-v", "v"))),
)

WORD = ("--prompt", "a photo of * on the beach")
SD_INVERSION = {**model_files("inversion-sd1"), "embedding.pt": embedding("clip", "*", 1)}
PERSONALIZATION = (
    PublicRun("inversion-stable-txt2img", INVERSION, "scripts/stable_txt2img.py",
              (*WORD, *MODEL, *SIZE, "--ddim_steps", "10", "--embedding_path", "embedding.pt"), SD_INVERSION),
    PublicRun("inversion-stable-txt2img-two-vectors", INVERSION, "scripts/stable_txt2img.py",
              (*WORD, *MODEL, *SIZE, "--ddim_steps", "10", "--embedding_path", "embedding.pt", "--plms"),
              {**SD_INVERSION, "embedding.pt": embedding("clip", "*", 2),
               "config.yaml": config("inversion-sd1", lambda section: set_vectors(section, 2))}),
    PublicRun("inversion-txt2img", INVERSION, "scripts/txt2img.py",
              (*WORD, *SIZE, "--outdir", "out", "--ddim_steps", "10", "--ckpt_path", "model.ckpt",
               "--embedding_path", "embedding.pt"),
              {"model.ckpt": weights("inversion-text2img"), "embedding.pt": embedding("bert", "*", 1),
               "configs/latent-diffusion/txt2img-1p4B-eval_with_tokens.yaml": config("inversion-text2img")}),
    PublicRun("inversion-merge", INVERSION, "merge_embeddings.py",
              ("-sd", "--manager_ckpts", "one.pt", "two.pt", "--output_path", "merged.pt"),
              {"one.pt": embedding("clip", "*", 1, width=768), "two.pt": embedding("clip", "@", 1, seed=1, width=768)},
              clip_width=768, stand_ins=("public_scripts.embeddings:record_merged",)),
    PublicRun("inversion-clip-eval-import", INVERSION, str(HERE / "import_evaluators.py")),
    PublicRun("inversion-clip-eval-our-file", INVERSION, str(HERE / "import_evaluators.py"), whole_checkout=True),
    PublicRun("dreambooth-stable-txt2img", DREAMBOOTH, "scripts/stable_txt2img.py",
              (*PROMPT, *MODEL, *SIZE, "--ddim_steps", "10"), model_files("inversion-sd1")),
    PublicRun("custom-sample-own-config", CUSTOM, "sample.py",
              ("--prompt", "a photo of a <new1> cat", *MODEL, *SIZE, "--ddim_steps", "10",
               "--delta_ckpt", "logs/checkpoints/delta.ckpt", "--modifier_token", "<new1>"),
              {"model.ckpt": weights("sd1-768"), "config.yaml": config("custom"),
               "logs/checkpoints/delta.ckpt": delta()},
              ldm=COMPVIS_SD, transformers4=True, clip_width=768),
    PublicRun("custom-sample-sd-config", CUSTOM, "sample.py", (*PROMPT, *MODEL, *SIZE, "--ddim_steps", "10"),
              model_files("sd1"), ldm=COMPVIS_SD),
)


def set_vectors(section: DictConfig, count: int) -> None:
    """Let a config's placeholder stand for several vectors."""
    section.model.params.personalization_config.params.num_vectors_per_token = count


def pix2pix_run(name: str, target: str = "") -> PublicRun:
    def retarget(section: DictConfig) -> None:
        if target:
            section.model.target = target
            del section.model.params.load_ema  # a param of the repository's own class

    return PublicRun(name, PIX2PIX, "edit_cli.py",
                     ("--resolution", "64", "--steps", "10", "--config", "config.yaml", "--ckpt", "model.ckpt",
                      "--input", "photo.png", "--output", "edited.png", "--edit", "make it blue", "--seed", "7"),
                     {"model.ckpt": weights("pix2pix"), "config.yaml": config("pix2pix", retarget),
                      "photo.png": photo()},
                     ldm="stable_diffusion", extra_path=(K_DIFFUSION,), images="edited.png")


WRAPPERS = (
    pix2pix_run("pix2pix-edit-own-config"),
    pix2pix_run("pix2pix-edit-ddpm", "ldm.models.diffusion.ddpm.LatentDiffusion"),
    *(PublicRun(f"k-diffusion-{kind}", K_DIFFUSION, str(HERE / "k_diffusion_samplers.py"), (wrapper,),
                model_files(model), ldm=repository, stand_ins=OPEN_CLIP)
      for kind, wrapper, model, repository in (("eps", "CompVisDenoiser", "sd1", COMPVIS_SD),
                                               ("v", "CompVisVDenoiser", "sd2-v", STABILITY))),
)
RUNS = (*STABLE_DIFFUSION, *LATENT_DIFFUSION, *STABLE_DIFFUSION_2, *PERSONALIZATION, *WRAPPERS)
