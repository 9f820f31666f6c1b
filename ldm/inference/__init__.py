"""Generate images with a base model and learned concepts.

    from ldm.inference import PerfusionPipeline

    pipe = PerfusionPipeline.from_pretrained("models/mini")
    pipe.load_concepts("teddy.safetensors", "teapot.safetensors")
    images = pipe("a <teddy> next to a <teapot>", seed=1, num_images=4, bias=0.5).images

Modules:
    pipeline.py       PerfusionPipeline: the one path from prompts to images; everything that generates calls it
    loaded_concepts.py   its concepts: from files, from values, or predicted from photos
    settings.py       dataclasses: what to generate, how, and with which model (no torch, so command lines stay quick)
    requests.py       one request for each image: prompt, negative prompt, seed
    model_config.py   image sizes, default settings and helper models from a model's config
    sgm_config.py     translates configs of Stability AI's generative-models
    loras.py          adds LoRAs of other tools to a model's weights
    encoding.py       encodes each distinct prompt once, under the concepts that it names
    notices.py        lines about what a run does unseen, and warnings of what the model does not know
    size_conditions.py  sizes that models such as Stable Diffusion XL read besides the prompt
    source_image.py   the image that img2img and inpainting start from
    auto_bias.py      `bias="auto"`: finds a bias that balances the prompt and the concept
    photo_concepts.py predicts concepts from photos, without training
    precision.py      whether to sample in 16 bits
    run.py            what the command-line scripts do: check, load, generate, write
    output_folder.py  numbered image files with their settings inside, and contact sheets

As the scripts of the LDM family do it, with one generator for all images:
    ldm_sampling.py   images of prompts, with words of Textual Inversion
    unconditional.py  images of a model without a condition
"""
from ldm.common.lazy_imports import forward_names

__getattr__ = forward_names(__name__, {
    "PerfusionPipeline": "ldm.inference.pipeline",
    "PipelineOutput": "ldm.inference.pipeline",
    "GenerationRequest": "ldm.inference.requests",
    "GenerationSettings": "ldm.inference.settings",
})
