"""Parsing of numbers in running text. Ambiguous numbers are reported as such.

Plain numbers are those of GSM8K's official code, `-?\\d+\\.?\\d*` with commas between thousands. In addition: `.5`, any dash
as a sign, also apart from its number (`- 5`, `-$5`), fractions and mixed numbers (`1/2`, `3 1/2`, `3½`), exponents (`1e3`),
and spaces or apostrophes between thousands (`1 000`). Text that could be two numbers (`3,5`) is not a number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

_BLANK = r"[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]"
"""Spaces within a line, including no-break spaces."""
_DASH = r"[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]"
_CURRENCY = r"\\?[$\u00a2-\u00a5\u20a0-\u20cf]"
_SLASH = rf"{_BLANK}?[/\u2044\u2215]{_BLANK}?"
_DIGITS = (
    r"(?:\d{{1,3}}(?P<{name}>[,'’_\u066c\uff0c]|" + _BLANK + r")\d{{3}}(?:(?P={name})\d{{3}})*(?!\d)"
    r"|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)"  # as in India
    r"|\d+)"
)
_NUMBER = re.compile(
    rf"(?:(?P<sign>{_DASH})(?P<apart>{_BLANK}*(?:{_CURRENCY}{_BLANK}*)?)|{_CURRENCY}{_BLANK}*(?P<inner>{_DASH}){_BLANK}*)?"
    r"(?:"
    rf"(?P<whole>{_DIGITS.format(name='a')}){_BLANK}+(?P<part>\d+){_SLASH}(?P<of>\d+)"
    rf"|(?P<numerator>{_DIGITS.format(name='b')}){_SLASH}(?P<denominator>{_DIGITS.format(name='c')})"
    rf"|(?P<digits>{_DIGITS.format(name='d')})(?:[.\u066b\uff0e](?P<decimals>\d*))?(?:[eE](?P<power>[-+\u2212]?\d+))?"
    r"|(?<![\w.)])(?P<point>[.,\u066b\uff0e])(?P<bare>\d+)(?:[eE](?P<barepower>[-+\u2212]?\d+))?"
    r")"
)
_GOES_ON = re.compile(
    rf"[.,:'’_\u066b\u066c\uff0c\uff0e]\d|\^|{_SLASH}\d|{_BLANK}*[x×*·]{_BLANK}*10{_BLANK}*(?:\^|\*\*|[⁰¹²³⁴-⁹⁻])"
    rf"|{_BLANK}+and{_BLANK}+(?:a|one|two|three){_BLANK}+(?:hal|third|quarter)",
)
"""Text after a number that changes its value: `1.2.3`, `3,5`, `10:30`, `2^5`, `3 x 10^2`, `3 and a half`."""
_CAME_BEFORE = re.compile(r"(?:\d[.,/'’_]|\^)$")
"""Text before a number that changes its value. In `Week 3:210` the second number stands alone."""
_SCALE = re.compile(rf"{_BLANK}*(?:hundred|thousand|million|billion|trillion|lakh|crore)s?\b|(?:[kK]|[mb]n|[MB])\b")
"""A multiplier or unit after a number. A question may ask for "how many million"."""
_VULGAR = re.compile(r"(?P<whole>(?<=\d))?(?P<sign>[¼-¾⅐-⅞↉])")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_ARROW = re.compile(r"[-=]+>")
_NOT_PLAIN = re.compile(r"[√∛∜±∓<>≤≥≠∞π]")
_REACH = 40
"""Number of characters around a number that are examined."""
_LARGEST_POWER = 400
"""A bound on powers of ten, beyond the range of a float."""


def numbers(text: str) -> Iterator[float | None]:
    """Yield the value of each number in `text`, in order. None for one that is ambiguous or outside the range of a float."""
    text = _spelled_out(text)
    return (_value(text, found) for found in _NUMBER.finditer(text))


def only_number(line: str) -> float | None:
    """Return the value of the only number in `line`. None if there is none, more than one, or an ambiguous one."""
    line = _spelled_out(_ARROW.sub(" ", line))
    found = list(_NUMBER.finditer(line))
    if len(found) != 1 or _NOT_PLAIN.search(line):
        return None
    (number,) = found
    before, after = line[: number.start()], line[number.end() :]
    # A dash that is not a sign, a point or slash that belongs to preceding text, a factorial, a multiplier.
    doubtful = number["sign"] and (not _negative(line, number) or before[-1:].isalnum())
    if doubtful or before[-1:] in tuple(".,'’/_-") or after.startswith("!") or _SCALE.match(after):
        return None
    return _value(line, number)


def _spelled_out(text: str) -> str:
    """Return `text` with single-character and LaTeX fractions written as digits and a slash."""

    def digits(found: re.Match[str]) -> str:
        value = Fraction(unicodedata.numeric(found["sign"])).limit_denominator(10)
        apart = "" if found["whole"] is None else " "
        return f"{apart}{value.numerator}/{value.denominator}"

    return _VULGAR.sub(digits, _LATEX_FRACTION.sub(r"\1/\2", text.replace("{,}", ",")))


def _value(text: str, found: re.Match[str]) -> float | None:
    before, after = text[max(0, found.start() - 2) : found.start()], text[found.end() : found.end() + _REACH]
    if _GOES_ON.match(after) or _CAME_BEFORE.search(before) or any(map(_is_odd_number, (before[-1:], after[:1]))):
        return None
    try:
        exact = _exact(found)
        if exact is None:
            return None
        value = float(-exact if _negative(text, found) else exact)
    except (ValueError, ZeroDivisionError, OverflowError):  # thousands of digits; 1/0; beyond the largest float
        return None
    # The float has another value than the text: a very large integer, or a number that underflowed to 0.
    lost = abs(exact) != abs(Fraction(value)) if exact.denominator == 1 else value == 0
    return None if lost else value


def _is_odd_number(character: str) -> bool:
    """Return whether `character` is numeric without being a digit: ², ⑤, 万."""
    return character.isnumeric() and not character.isdecimal()


def _exact(found: re.Match[str]) -> Fraction | None:
    """Return the number without its sign, or None if it is ambiguous."""
    if found["whole"]:
        part = Fraction(int(found["part"]), int(found["of"]))
        whole = _whole(found["whole"])
        return None if whole is None or part >= 1 else whole + part
    if found["numerator"]:
        top, bottom = _whole(found["numerator"]), _whole(found["denominator"])
        return None if top is None or bottom is None else Fraction(top, bottom)
    if found["point"] == ",":
        return None
    digits = 0 if found["bare"] else _whole(found["digits"])
    decimals = found["bare"] or found["decimals"] or ""
    power = int((found["power"] or found["barepower"] or "0").replace("\u2212", "-"))
    if digits is None or abs(power) > _LARGEST_POWER:
        return None
    return (digits + Fraction(int(decimals or "0"), 10 ** len(decimals))) * Fraction(10) ** power


def _whole(digits: str) -> int | None:
    """Return a whole number, with or without thousands separators. None for a leading 0 with separators (a decimal comma)."""
    plain = "".join(filter(str.isdecimal, digits))
    return None if plain != digits and int(plain[0]) == 0 else int(plain)


def _negative(text: str, found: re.Match[str]) -> bool:
    """Return whether there is a dash before the number that is its sign, and not a minus, a "to" or a bullet."""
    sign, apart = found["sign"], found["apart"]
    if found["inner"] or (sign == "-" and not apart):
        return True
    if not sign:
        return False
    # Far enough back to find the number that a minus subtracts from.
    before = text[max(0, found.start() - _REACH) : found.start()]
    if before[-1:].isalnum() or before.endswith(")"):
        return False
    last = re.sub(rf"{_BLANK}+\Z", "", before)[-1:]
    if re.match(_BLANK, apart):
        return not last or last in tuple(':=([{$*"')
    return not apart or not (last.isdecimal() or last == ")")
