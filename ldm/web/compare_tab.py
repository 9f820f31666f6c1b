"""The tab "Compare": where images look at a word, and how similar they are to prompt and photos."""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import gradio as gr

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.inference.settings import GenerationSettings
from ldm.web.choice import choice
from ldm.web.concept_files import ConceptFiles
from ldm.web.events import OWN
from ldm.web.generate_form import LARGEST_SEED, MOST_STEPS
from ldm.web.messages import user_errors
from ldm.web.model_imports import import_models
from ldm.web.numbers import whole_number_in
from ldm.web.site import Site

if TYPE_CHECKING:
    import pandas as pd

    from ldm.web.comparison import Comparison

FEWEST_STEPS = 3  # one for each part of the sampling
COLUMNS = ["image", "similar to the prompt", "similar to the photos"]


class CompareTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.
        concepts: the concept files to choose from.
    """

    def __init__(self, site: Site, concepts: ConceptFiles) -> None:
        self.site, self.concepts = site, concepts

    @functools.cached_property
    def comparison(self) -> Comparison:
        """What compares; made at the first use, since the CLIPs' library takes seconds to load."""
        import_models()
        from ldm.web.comparison import Comparison

        return Comparison(self.site, self.concepts)

    def build(self, paths: gr.State) -> None:
        """Add the components and their events.

        Args:
            paths: the files of the gallery's images.
        """
        self.chosen = choice(label="Concepts", multiselect=True)
        gr.Markdown("### Where does the image look at a word?")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", placeholder="a photo of a <my-teddy> on the beach", scale=4)
            word = gr.Textbox(label="Word", placeholder="<my-teddy>", scale=2)
            seed = gr.Number(label="Seed", value=1, precision=0, minimum=0, scale=1)
            steps = gr.Number(label="Steps", value=15, precision=0, minimum=3, scale=1)
        look = gr.Button("Show attention", variant="primary")
        gr.Markdown("The image, and its attention to the word in early, middle and late steps.")
        maps = gr.Gallery(label="Attention", show_label=False, columns=4, height=300, object_fit="contain",
                          elem_id="attention")
        gr.Markdown("### How similar are the images of the tab Generate?")
        measure = gr.Button("Measure similarity")
        table = gr.Dataframe(headers=COLUMNS, interactive=False, label="Cosines of CLIP embeddings: higher is closer")
        look.click(self.attention, [prompt, word, self.chosen, seed, steps], [maps], concurrency_id="pipeline",
                   concurrency_limit=1, **OWN)
        measure.click(self.similarities, [paths, self.chosen], [table], **OWN)

    def refresh(self, chosen: list[str] | None) -> Any:
        """Return the concepts to choose from."""
        return self.concepts.dropdown(chosen)

    @user_errors
    def attention(self, prompt: str, word: str, chosen: list[str] | None, seed: float, steps: float) -> list[Any]:
        """Return an image and its attention maps."""
        settings = GenerationSettings(num_inference_steps=whole_number_in("steps", steps, FEWEST_STEPS, MOST_STEPS))
        return self.comparison.attention(prompt, word, chosen or [], whole_number_in("seed", seed, 0, LARGEST_SEED),
                                         settings)

    @user_errors
    def similarities(self, paths: list[str], chosen: list[str] | None) -> pd.DataFrame:
        """Return a table of the gallery's images."""
        import pandas as pd

        if not paths:
            raise UserError("no images yet; generate some first")
        kinds = {fold_word(concept.placeholder): concept.super_category for concept in self.concepts.read(chosen or [])}
        photos = self.concepts.photos_of(chosen or [])
        rows = []
        for similarity in self.comparison.similarities(paths, photos, kinds):
            numbers = [None if value is None else round(value, 3) for value in (similarity.text, similarity.photos)]
            rows.append((similarity.name, *numbers))
        return pd.DataFrame(rows, columns=COLUMNS)
