"""Use concepts in the pipelines of Hugging Face's diffusers: `pip install -e ".[diffusers]"`.

    from ldm.integrations.diffusers import load_concepts, unload_concepts

    concepts = load_concepts(pipe, ["teddy.safetensors", "teapot.safetensors"])
    pipe("a <teddy> next to a <teapot>", negative_prompt="blurry")
    concepts.set(bias={"<teddy>": 0.6}, temperature=0.1, global_locking=False)
    unload_concepts(pipe)

How a prompt reaches a layer: `encode_prompt`, wrapped on the pipeline, encodes it with the learned words, computes the
edit (Eq. 3) and packs it beside the encoding, on the last axis of the embeddings. The pipeline carries these rows to
the U-Net, where a processor around that of each cross-attention layer computes keys and values from them. No weight,
tokenizer or embedding table changes.

Modules:
    pipelines.py        load_concepts and unload_concepts; what is installed where
    loaded_concepts.py  LoadedConcepts: the concepts of a pipeline, and their settings
    prompts.py          encodes the prompts of a call under the edit
    words.py            learned words in text encoders that do not know them
    rows.py             the layout of packed rows
    processors.py       attention processors that apply the edit
    base_model.py       recognizes the base model, and names its layers
"""
import importlib.util

if importlib.util.find_spec("diffusers") is None:
    raise ImportError("ldm.integrations.diffusers needs diffusers, which is not installed: "
                      "pip install -e \".[diffusers]\"")

from ldm.integrations.diffusers.loaded_concepts import LoadedConcepts  # noqa: E402
from ldm.integrations.diffusers.pipelines import load_concepts, unload_concepts  # noqa: E402

__all__ = ["LoadedConcepts", "load_concepts", "unload_concepts"]
