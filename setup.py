"""Install the package `ldm` with what training and sampling need; `.[test]` adds what the tests need."""
from setuptools import find_packages, setup

# A copied package ("pip install .") has models and configs inside, where `ldm.common.paths` looks for them. The
# checkout has them beside the package, and an editable install uses those.
BUNDLED = {"ldm.bundled.models": "models", "ldm.bundled.configs": "configs"}
BUNDLED_FILES = {
    "ldm.bundled.models": ["clip_tokenizer/*", "bert_tokenizer/*", "mini/**/*", "**/config.yaml"],
    "ldm.bundled.configs": ["**/*"],
    "ldm.integrations.comfyui": ["*.md", "*.toml", "*.json", "*.png", "example_workflows/*"],
}

setup(
    name="perfusion-ldm",
    version="0.1.0",
    description="Perfusion: key-locked rank-one personalization of latent diffusion models",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ldm", "ldm.*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data=BUNDLED_FILES,
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "pytorch-lightning>=2.6",
        "omegaconf>=2.3",
        "transformers>=5.6",
        "open-clip-torch",
        "kornia>=0.7",  # augments the images that the segmenter is trained on
        "numpy",
        "scipy",  # resamples the means of evaluations
        "filelock",  # keeps two evaluations out of one folder
        "pillow>=11.3",  # the first version that reads AVIF
        "pillow-heif",  # reads the HEIC photos of phones
        "safetensors>=0.4",
        "tensorboard",
        "tqdm",
        "taming-transformers-rom1504",  # the quantizer and the discriminator of the public first stages
        "einops",  # a dependency of that package, which does not declare it
    ],
    extras_require={
        "diffusers": ["diffusers>=0.35", "accelerate"],  # concepts in its pipelines; it loads models by accelerate
        "evaluation": ["matplotlib"],
        "benchmark": ["diffusers>=0.35", "peft"],
        "web": ["gradio>=6", "psutil"],  # the page; psutil finds the process of a run again
        "notebook": ["notebook", "ipykernel", "ipywidgets"],
        "test": ["pytest", "pytest-xdist",  # the latter runs tests side by side
                 "hypothesis", "diffusers>=0.35", "perfusion-pytorch", "ruff", "matplotlib", "peft",
                 "nbclient", "ipykernel",  # these two run docs/quickstart.ipynb
                 "gradio>=6", "psutil", "playwright"],  # and these the page, in a browser
    },
)
