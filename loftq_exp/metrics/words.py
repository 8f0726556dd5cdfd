"""Tokenization for ROUGE: rouge-score's own words in ASCII text, and words of all other scripts.

rouge-score treats everything but a-z and 0-9 as a separator. Texts in most scripts would have no words and would score 0
against themselves.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize, tokenizers

_WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI SYLLABLE")
"""Prefixes of Unicode letter names in scripts without spaces between words. Each such letter is a word."""
_NO_WIDTH = dict.fromkeys([0x200C, 0x200D, *range(0xFE00, 0xFE10)])
"""Joiners and variation selectors, which may occur inside a word."""


class Words(tokenizers.Tokenizer):
    """Tokenizes into lower-case words. Words of ASCII letters and digits are Porter-stemmed as in rouge-score."""

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """Return the words of `text` in order: runs of letters, their combining marks and digits."""
        if text.isascii():
            return list(tokenize.tokenize(text, self._stemmer))
        words: list[str] = []
        for run in _runs(text):
            words += tokenize.tokenize(run, self._stemmer) if run.isascii() else [run]
        return words


def has_words(text: str) -> bool:
    """Return whether `text` has a word for ROUGE. Without one ROUGE is undefined, and rouge-score returns 0."""
    return any(_kind(character) in ("letter", "alone") for character in text)


def _runs(text: str) -> list[str]:
    """Return the unstemmed words of `text`, in NFC, so that composed and decomposed accents are equal."""
    pieces, previous = [], ""
    for character in unicodedata.normalize("NFC", text.lower().translate(_NO_WIDTH)):
        kind = _kind(character)
        if kind == "mark":  # belongs to the preceding letter
            pieces.append(character if previous else " ")
            continue
        apart = kind == "alone" or previous == "alone"
        pieces.append((" " if apart else "") + (character if kind else " "))
        previous = kind
    return "".join(pieces).split()


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> str:
    """Return `letter` (also for digits), `alone` for a letter that is a word, `mark`, or an empty string for a separator."""
    if character.isascii():
        return "letter" if character.isalnum() else ""
    category = unicodedata.category(character)
    if category in ("Mn", "Mc"):
        return "mark"
    if category[0] != "L" and category != "Nd":
        return ""
    return "alone" if unicodedata.name(character, "").startswith(_WITHOUT_BLANKS) else "letter"
