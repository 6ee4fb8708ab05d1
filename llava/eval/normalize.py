"""The two answer normalisers of the VQA family, quirks included.

`m4c` is the one of the TextVQA scorer and of LLaVA's VQAv2 and VizWiz uploads; `vqa_official` is the one
inside the VQA scorer. Both end in the same two passes (punctuation; number words, articles, contractions)
and differ in what happens before: m4c deletes commas and question marks and splits off `'s`.

The tables are those of the public VQA evaluation code (GT-Vision-Lab/VQA); tests compare both with its
output.
"""

import re
from functools import lru_cache

REMEMBERED = 1 << 16
"""Texts whose normal form is kept: answers and references are short, and most come again and again."""

# Each of these is deleted where the answer shows it next to a blank, and becomes a blank otherwise.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},  # none -> 0 is intended
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}

# Written without its apostrophe -> the contraction.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
    who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Either of the last two apostrophes forgotten -> the contraction (with both forgotten it is not recognised).
_TWO_APOSTROPHES = """
    couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        *_, first, last = (match.start() for match in re.finditer("'", word))
        table[word[:first] + word[first + 1 :]] = word
        table[word[:last] + word[last + 1 :]] = word
    table |= {"yall'd've": "y'all'd've", "y'alld've": "y'all'd've"}
    table |= {"yall'll": "y'all'll", "y'allll": "y'all'll"}
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table["somebody'd"] = "somebodyd"  # sic, in both tools
    return table


CONTRACTIONS = _contractions()
_DIGIT_COMMA = re.compile(r"\d,\d")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the VQA tool passes a flag (re.UNICODE = 32) where the count belongs


def punctuation(text: str) -> str:
    """Drop or blank the marks of `PUNCTUATION`, then drop periods that no digit follows."""
    glue = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if glue or mark + " " in text or " " + mark in text else " ")
    return _LOOSE_PERIOD.sub("", out, count=_MOST_PERIODS)


def digits_and_articles(text: str) -> str:
    """Lower case, number words to digits, no articles, contractions repaired, one blank between words."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def flatten(text: str) -> str:
    """Newlines and tabs to blanks; outer blanks dropped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(REMEMBERED)
def vqa_official(text: str) -> str:
    return digits_and_articles(punctuation(flatten(text)))


@lru_cache(REMEMBERED)
def m4c(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_official(text.strip())


def soft_score(matches: int) -> float:
    """Score of an answer that `matches` of ten references share: the mean over the ten of leaving one out of
    min(others that agree / 3, 1), which is 0, .3, .6, .9, 1, 1, ... for 0, 1, 2, 3, 4, 5, ... matches."""
    return min(matches * 3, 10) / 10
