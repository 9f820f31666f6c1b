"""The tab "Combine": merge concepts into one file, and give them other words."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from ldm.common.errors import UserError
from ldm.web.choice import choice
from ldm.web.concept_files import ConceptFiles
from ldm.web.events import OWN, QUIET
from ldm.web.messages import as_html, user_errors

if TYPE_CHECKING:
    import pandas as pd


class CombineTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        concepts: the concept files to choose from.
    """

    def __init__(self, concepts: ConceptFiles) -> None:
        self.concepts = concepts

    def build(self) -> None:
        """Add the components and their events."""
        self.chosen = choice(label="Concepts", multiselect=True)
        self.words = gr.Dataframe(headers=["concept", "word in prompts"], datatype="str", interactive=True,
                                  static_columns=[0], label="Their words; change them here", type="pandas")
        self.name = gr.Textbox(label="Name of the new file", value="merged", max_lines=1)
        self.button = gr.Button("Merge", variant="primary")
        self.file = gr.File(label="The merged concepts", interactive=False)
        self.status = gr.HTML(elem_id="combine-status")
        self.chosen.change(self.words_of, [self.chosen], [self.words], **QUIET)
        self.button.click(self.merge, [self.chosen, self.words, self.name], [self.file, self.status], **OWN)

    def refresh(self, chosen: list[str] | None) -> Any:
        """Return the concepts to choose from."""
        return self.concepts.dropdown(chosen)

    @user_errors
    def words_of(self, chosen: list[str] | None) -> pd.DataFrame:
        """Return a table of the concepts and their words."""
        import pandas as pd

        rows = [(concept.super_category, concept.placeholder) for concept in self.concepts.load(chosen or [])]
        return pd.DataFrame(rows, columns=["concept", "word in prompts"])

    @user_errors
    def merge(self, chosen: list[str] | None, words: pd.DataFrame, name: str) -> tuple[str, str]:
        """Write the merged file."""
        if not chosen:
            raise UserError("choose the concepts to merge")
        placeholders = [str(word).strip() for word in words.iloc[:, -1]]
        path = self.concepts.merge(chosen, placeholders, name)
        return str(path), as_html([f"{path.name}: {', '.join(placeholders)}"])
