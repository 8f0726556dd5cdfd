"""Sentences of a text.

nltk's Punkt finds those of an English text. Its trained English model would have to be downloaded; its rules with a list of
abbreviations, given here, do without. Of the scores, only ROUGE-Lsum and Lead-3 depend on where sentences end.
"""

from __future__ import annotations

import re

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


_FULL_STOPS = "\u0964\u0965。！？｡．؟۔።፧།။៕"
"""Of scripts other than Latin, each the end of a sentence without a doubt: Punkt looks for none of them."""
_UP_TO_FULL_STOP = re.compile(rf"[^{_FULL_STOPS}]*[{_FULL_STOPS}]+[\"'”’»」』）)\]]*|[^{_FULL_STOPS}]+")


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, without blanks around them; a line end also ends one.

    Thai and other scripts without a full stop have one a line.
    """
    parts = (part.strip() for line in text.splitlines() for part in _UP_TO_FULL_STOP.findall(line))
    return [sentence for part in parts for sentence in _SPLITTER.tokenize(part)]
