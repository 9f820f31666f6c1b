"""The tab "Combine": merge concepts into one file, and give them other words."""
from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd

from ldm.common.errors import UserError
from ldm.concepts.storage import load_concepts
from ldm.web.concept_files import ConceptFiles
from ldm.web.messages import user_errors


class CombineTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        concepts: the concept files to choose from.
    """

    def __init__(self, concepts: ConceptFiles) -> None:
        self.concepts = concepts

    def build(self) -> None:
        """Add the components and their events."""
        self.chosen = gr.Dropdown(label="Concepts", choices=[], multiselect=True, interactive=True)
        self.words = gr.Dataframe(headers=["concept", "word in prompts"], datatype="str", interactive=True,
                                  static_columns=[0], label="Their words; change them here", type="pandas")
        self.name = gr.Textbox(label="Name of the new file", value="merged", max_lines=1)
        self.button = gr.Button("Merge", variant="primary")
        self.file = gr.File(label="The merged concepts", interactive=False)
        self.status = gr.Markdown(elem_id="combine-status")
        self.chosen.change(self.words_of, [self.chosen], [self.words])
        self.button.click(self.merge, [self.chosen, self.words, self.name], [self.file, self.status],
                          api_name="merge")

    def refresh(self, chosen: list[str] | None) -> Any:
        """Return the concepts to choose from."""
        choices, value = self.concepts.choices(chosen)
        return gr.Dropdown(choices=choices, value=value)

    @user_errors
    def words_of(self, chosen: list[str] | None) -> pd.DataFrame:
        """Return a table of the concepts and their words."""
        rows = []
        for path in self.concepts.check(chosen or []):
            for concept in load_concepts(path):
                rows.append((concept.super_category or concept.placeholder, concept.placeholder))
        return pd.DataFrame(rows, columns=["concept", "word in prompts"])

    @user_errors
    def merge(self, chosen: list[str] | None, words: pd.DataFrame, name: str) -> tuple[str, str]:
        """Write the merged file."""
        if len(chosen or []) < 1:
            raise UserError("choose the concepts to merge")
        placeholders = [str(word).strip() for word in words.iloc[:, 1]]
        path = self.concepts.merge(chosen, placeholders, name)
        return str(path), f"{path.name}: {', '.join(f'`{word}`' for word in placeholders)}"
