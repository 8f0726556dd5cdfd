"""Sentence splitting.

It uses the rules of nltk's Punkt with the list of abbreviations below, because Punkt's trained English model needs a
download. Only the scores ROUGE-Lsum and Lead-3 depend on sentence boundaries.
"""

from __future__ import annotations

import re

from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen col lt sgt capt sen rep gov hon st jr sr messrs mt ft no vs etc approx dept est inc ltd co corp "
    "bros fig vol pp ed eds al i.e e.g cf u.s u.k u.n e.u d.c a.m p.m ph.d b.a m.a jan feb mar apr jun jul aug sep sept oct "
    "nov dec"
)
"""In lower case, without the last full stop, separated by spaces."""


_PARAMETERS = PunktParameters()
_PARAMETERS.abbrev_types = set(ABBREVIATIONS.split())
_SPLITTER = PunktSentenceTokenizer(_PARAMETERS)


_FULL_STOPS = "\u0964\u0965。！？｡．؟۔።፧།။៕"
"""Full stops of other scripts, which always end a sentence. Punkt does not know them."""
_UP_TO_FULL_STOP = re.compile(rf"[^{_FULL_STOPS}]*[{_FULL_STOPS}]+[\"'”’»」』）)\]]*|[^{_FULL_STOPS}]+")


def sentences(text: str) -> list[str]:
    """Return the sentences of `text` in order, stripped. A line end also ends a sentence.

    In Thai and other scripts without a full stop, each line is one sentence.
    """
    parts = (part.strip() for line in text.splitlines() for part in _UP_TO_FULL_STOP.findall(line))
    return [sentence for part in parts for sentence in _SPLITTER.tokenize(part)]
