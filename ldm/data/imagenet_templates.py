"""The captions that Textual Inversion and its forks train on, in their order: a seed then draws the same ones.

They are CLIP's prompts for ImageNet (Radford et al. 2021), as Gal et al. (arXiv 2208.01618) list them for subjects and
for styles. `ldm.data.templates` has those of this project's own methods.
"""
from __future__ import annotations

DETERMINERS_OF_SUBJECTS = """
    a photo of a; a rendering of a; a cropped photo of the; the photo of a; a photo of a clean; a photo of a dirty;
    a dark photo of the; a photo of my; a photo of the cool; a close-up photo of a; a bright photo of the;
    a cropped photo of a; a photo of the; a good photo of the; a photo of one; a close-up photo of the;
    a rendition of the; a photo of the clean; a rendition of a; a photo of a nice; a good photo of a;
    a photo of the nice; a photo of the small; a photo of the weird; a photo of the large; a photo of a cool;
    a photo of a small"""
WORKS_IN_A_STYLE = """
    a painting; a rendering; a cropped painting; the painting; a clean painting; a dirty painting; a dark painting;
    a picture; a cool painting; a close-up painting; a bright painting; a cropped painting; a good painting;
    a close-up painting; a rendition; a nice painting; a small painting; a weird painting; a large painting"""
WORKS_WITH_A_SECOND_WORD = """
    a painting; a rendering; a cropped painting; the painting; a clean painting; a dirty painting; a dark painting;
    a cool painting; a close-up painting; a bright painting; a cropped painting; a good painting; a painting of one {};
    a nice painting; a small painting; a weird painting; a large painting"""
MEDIA = ("a photo", "an illustration", "a depiction")


def _split(text: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in text.split(";")]


def _subject_templates() -> tuple[str, ...]:
    """Return the templates of subjects, once for each medium. Only captions that begin with a photo change with it."""
    captions = []
    for medium in MEDIA:
        for phrase in _split(DETERMINERS_OF_SUBJECTS):
            in_medium = phrase.replace("a photo of", f"{medium} of") if phrase.startswith("a photo of") else phrase
            captions.append(f"{in_medium} {{}}")
    return tuple(captions)


def _dual_style_template(work: str) -> str:
    """Return a template of a style and a second word. One names that word in the place of the subject."""
    return f"{work} in the style of {{}}" if "{}" in work else f"{work} in the style of {{}} with {{}}"


SUBJECT = _subject_templates()
SUBJECT_DUAL = tuple(f"{caption} with {{}}" for caption in SUBJECT[:len(SUBJECT) // len(MEDIA)])
STYLE = tuple(f"{work} in the style of {{}}" for work in _split(WORKS_IN_A_STYLE))
STYLE_DUAL = tuple(map(_dual_style_template, _split(WORKS_WITH_A_SECOND_WORD)))
DREAMBOOTH = ("photo of a sks {}",)
REGULARIZATION = ("photo of a {}",)
PER_IMAGE_TOKENS = list("אבגדהוזחטיכלמנסעפצקרשת")
