"""The options of a training run. Imports no torch, so that command lines answer at once."""
from __future__ import annotations

from dataclasses import dataclass

from ldm.common.errors import UserError
from ldm.common.words import super_category_words

NO_MASKS = "none"
DEFAULT_SEED = 23
SEED_LIMIT = 2**32


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a training run, from a command line or from Python. None leaves a setting to the configs.

    Attributes:
        configs: YAML files, later ones override earlier ones (--base).
        overrides: "key=value" pairs that override the configs.
        resume: log folder or checkpoint of a run to continue.
        resume_anyway: continue it even if configs, options or the run's files differ from those of before.
        name: name of the log folder, after the date; "" uses the name of the last config.
        postfix: text after that name.
        logdir: folder of all log folders.
        train: False builds model and data, reports, and stops.
        scale_lr: multiply `base_learning_rate` by devices x batch size x accumulation.
        seed: the random seed, from 0 to `SEED_LIMIT` - 1.
        data_root: folders of photos, one for each concept.
        super_category: what kind of subject each concept is, or one for all of them (--init_word).
        init_embedding: embedding or concept files whose words the concepts start from (--init_embedding).
        placeholder: the word of each concept in prompts. Several concepts without one are named after their folders.
        masks: folders of masks, one for each concept, or "none".
        crop: "subject" or "center", the part of each photo to train on.
        checkpoint: base model, a .ckpt, .safetensors or diffusers folder (--actual_resume).
        vae: file that the first stage is taken from instead.
        text_encoder: file or folder that the text encoder's weights are taken from instead.
        accelerator: "cpu", "gpu" or "mps".
        devices: number or list of devices.
        max_steps: training steps.
        precision: as Lightning names it, such as "bf16-mixed".
        gpus: as Lightning 1 names them: "0," is the first GPU, "2" are two.
        reg_data_root: images of the subject's class, for DreamBooth configs with a section `reg`.
        class_word: the class in the captions of these configs.
        embedding_manager_ckpt: vectors from which Textual Inversion starts.

    Raises:
        UserError: an override is not of the form key=value, or a super-category is no plain words.
    """

    configs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    resume: str = ""
    resume_anyway: bool = False
    name: str = ""
    postfix: str = ""
    logdir: str = "logs"
    train: bool = True
    scale_lr: bool = True
    seed: int | None = None
    data_root: tuple[str, ...] | None = None
    super_category: tuple[str, ...] | None = None
    init_embedding: tuple[str, ...] | None = None
    placeholder: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None
    crop: str | None = None
    checkpoint: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    accelerator: str | None = None
    devices: str | None = None
    max_steps: int | None = None
    precision: str | None = None
    gpus: str | None = None
    reg_data_root: str | None = None
    class_word: str | None = None
    embedding_manager_ckpt: str | None = None

    def __post_init__(self) -> None:
        for words in self.super_category or ():
            super_category_words(words)  # raises if it is none
        for override in self.overrides:
            if "=" not in override or override.startswith("-"):
                raise UserError(f"{override}: neither a flag (see --help) nor a key=value override")
