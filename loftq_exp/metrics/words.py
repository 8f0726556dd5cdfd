"""The words that ROUGE compares: rouge-score's own in ASCII text, and those of every other script beside them.

rouge-score takes everything but a-z and 0-9 for a separator, so that texts in most scripts have no word at all and score 0
against themselves.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize, tokenizers

_WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI SYLLABLE")
"""How Unicode's names of the letters begin in scripts that put no blank between words: each letter counts as a word."""
_NO_WIDTH = dict.fromkeys([0x200C, 0x200D, *range(0xFE00, 0xFE10)])
"""Joiners and variation selectors: they shape the letters of one word."""


class Words(tokenizers.Tokenizer):
    """Words in lower case. Those of ASCII letters and digits are Porter-stemmed, as rouge-score stems them."""

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """The words of `text` in order: runs of letters, the marks on them and digits."""
        if text.isascii():
            return list(tokenize.tokenize(text, self._stemmer))
        words: list[str] = []
        for run in _runs(text):
            words += tokenize.tokenize(run, self._stemmer) if run.isascii() else [run]
        return words


def has_words(text: str) -> bool:
    """Whether ROUGE finds a word in `text`: without one it is undefined, and rouge-score gives 0."""
    return any(_kind(character) in ("letter", "alone") for character in text)


def _runs(text: str) -> list[str]:
    """The words of `text` unstemmed. A letter and its accent have one form, however the text spells them."""
    pieces, previous = [], ""
    for character in unicodedata.normalize("NFC", text.lower().translate(_NO_WIDTH)):
        kind = _kind(character)
        if kind == "mark":  # belongs to what stands before it
            pieces.append(character if previous else " ")
            continue
        apart = kind == "alone" or previous == "alone"
        pieces.append((" " if apart else "") + (character if kind else " "))
        previous = kind
    return "".join(pieces).split()


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> str:
    """`letter` (digits too), `alone` for a letter that is a word, `mark`, or nothing for what separates words."""
    if character.isascii():
        return "letter" if character.isalnum() else ""
    category = unicodedata.category(character)
    if category in ("Mn", "Mc"):
        return "mark"
    if category[0] != "L" and category != "Nd":
        return ""
    return "alone" if unicodedata.name(character, "").startswith(_WITHOUT_BLANKS) else "letter"
