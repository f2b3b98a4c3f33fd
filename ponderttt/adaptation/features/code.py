"""Metrics of the chunk's text that mean something in any programming language.

Nothing is parsed: a chunk begins and ends anywhere, and its language is unknown. Comments, strings
and words are found by patterns that run in linear time on any text.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ponderttt.adaptation.features.group import FeatureGroup
from ponderttt.adaptation.observation import ChunkObservation

TAB_WIDTH = 4

CONTROL_WORDS = """
if else elif elsif elseif unless then begin end do done while until for foreach loop in of switch
case default match when where break continue goto return yield await async try except catch finally
raise throw throws defer with select
"""
DEFINITION_WORDS = """
def class function func fn fun sub proc let var val const mut static final void struct enum union
interface trait impl type typedef typename template namespace package module mod import from export
include require use using extern crate pub public private protected internal abstract virtual
override inline extends implements operator sealed object define undef ifdef ifndef endif pragma
"""
VALUE_WORDS = """
int float double char bool boolean string long short unsigned signed auto register volatile true
false null nil none True False None NULL self this super new delete sizeof typeof instanceof is not
and or as lambda pass global nonlocal del assert local print
"""
KEYWORDS = frozenset(f"{CONTROL_WORDS} {DEFINITION_WORDS} {VALUE_WORDS}".split())

WORD = re.compile(r"[^\W\d]\w*")
INDENT = re.compile(r"^([ \t]*)\S", re.MULTILINE)
#: Unclosed literals end with their line, or the chunk, so no text makes the scan start over.
COMMENT_OR_STRING = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+(?:"""|\\?\Z)'
    r"|'''(?:[^'\\]++|\\.|'(?!''))*+(?:'''|\\?\Z)"
    r"|/\*(?:[^*]++|\*(?!/))*+(?:\*/|\Z)"
    r"|<!--(?:[^-]++|-(?!->))*+(?:-->|\Z)"
    # not a URL's slashes, a preprocessor line or a Rust attribute
    r"|(?:(?<!:)//|\#(?![a-z\[])|--[ ])[^\n]*+"
    r'|"(?:[^"\\\n]++|\\.)*+"?'
    r"|'(?:[^'\\\n]++|\\.)*+'?"
    r"|`(?:[^`\\\n]++|\\.)*+`?",
    re.DOTALL,
)

_BYTES = np.arange(256, dtype=np.uint8)
_IS_SPACE = np.isin(_BYTES, np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8))
_IS_PUNCTUATION = np.isin(
    _BYTES, np.frombuffer(b"!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~", dtype=np.uint8)
)
_NESTING = np.zeros(256, dtype=np.int64)
_NESTING[np.frombuffer(b"([{", dtype=np.uint8)] = 1
_NESTING[np.frombuffer(b")]}", dtype=np.uint8)] = -1


@dataclass(frozen=True, slots=True)
class CodeView:
    """One chunk's text, its UTF-8 bytes and its words (keywords and identifiers apart)."""

    text: str
    data: bytes
    codes: NDArray[np.uint8]
    words: int
    identifiers: list[str]


def _view(obs: ChunkObservation) -> CodeView:
    data = obs.text.encode("utf-8", "replace")
    words = WORD.findall(obs.text)
    identifiers = [word for word in words if word not in KEYWORDS]
    codes = np.frombuffer(data, dtype=np.uint8)
    return CodeView(obs.text, data, codes, len(words), identifiers)


def identifier_diversity(view: CodeView) -> float:
    """Distinct identifiers / identifiers, in [0, 1]; 0 where there are none.

    An identifier is a word that is a keyword of no common language.
    """
    return len(set(view.identifiers)) / max(1, len(view.identifiers))


def keyword_share(view: CodeView) -> float:
    """Keywords / words, in [0, 1], after the union of common languages; 0 without words."""
    return 1.0 - len(view.identifiers) / view.words if view.words else 0.0


def punctuation_share(view: CodeView) -> float:
    """ASCII punctuation except `_` / bytes that are not white space, in [0, 1]."""
    visible = view.codes.size - int(np.count_nonzero(_IS_SPACE[view.codes]))
    return int(np.count_nonzero(_IS_PUNCTUATION[view.codes])) / max(1, visible)


def comment_share(view: CodeView) -> float:
    """Characters in comments and string literals / characters, in [0, 1]: prose or code."""
    inside = sum(map(len, COMMENT_OR_STRING.findall(view.text)))
    return inside / max(1, len(view.text))


def indentation(view: CodeView) -> float:
    """Mean over lines that are not blank of log(1 + columns of indentation); a tab ends at 4."""
    widths = [len(blank.expandtabs(TAB_WIDTH)) for blank in INDENT.findall(view.text)]
    return float(np.log1p(widths).mean()) if widths else 0.0


def bracket_depth(view: CodeView) -> float:
    """log(1 + mean over bytes of the nesting depth in (), [], {}).

    The shallowest point of the chunk counts as 0, since the chunk may begin inside brackets.
    """
    if not view.codes.size:
        return 0.0
    depth = np.cumsum(_NESTING[view.codes])
    return math.log1p(float(depth.mean()) - min(0, int(depth.min())))


def line_variation(view: CodeView) -> float:
    """log(1 + σ / mean) of the lengths of all lines in characters: regular or ragged."""
    lengths = np.fromiter(map(len, view.text.split("\n")), dtype=np.float64)
    mean = float(lengths.mean())
    return math.log1p(float(lengths.std()) / mean) if mean > 0 else 0.0


def compressed_share(view: CodeView) -> float:
    """Bytes after deflate (level 6, no header) / bytes, at most 1: low for repetitive text."""
    if not view.data:
        return 1.0
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = len(packer.compress(view.data)) + len(packer.flush())
    return min(1.0, packed / len(view.data))


CODE = FeatureGroup(
    name="code",
    prepare=_view,
    features=(
        identifier_diversity,
        keyword_share,
        punctuation_share,
        comment_share,
        indentation,
        bracket_depth,
        line_variation,
        compressed_share,
    ),
)
