"""Sentences of an English text.

nltk's Punkt finds them. Its trained English model would have to be downloaded; its rules with a list of abbreviations, given
here, do without. Of the scores, only ROUGE-Lsum and Lead-3 depend on where sentences end.
"""

from __future__ import annotations

from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen col lt sgt capt sen rep gov hon st jr sr messrs mt ft no vs etc approx dept est inc ltd co corp "
    "bros fig vol pp ed eds al i.e e.g cf u.s u.k u.n e.u d.c a.m p.m ph.d b.a m.a jan feb mar apr jun jul aug sep sept oct "
    "nov dec"
)
"""In lower case, without the last full stop, separated by blanks."""


_PARAMETERS = PunktParameters()
_PARAMETERS.abbrev_types = set(ABBREVIATIONS.split())
_SPLITTER = PunktSentenceTokenizer(_PARAMETERS)


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, without blanks around them; a line end also ends one."""
    return [sentence for line in text.splitlines() for sentence in _SPLITTER.tokenize(line.strip())]
