"""Code metrics against numbers counted by hand, in several languages."""

from __future__ import annotations

import math
import time

import pytest

from tests.ponderttt.adaptation.features.observations import feature, make_observation

SNIPPET = "if x:\n    return foo(x)\n"

LANGUAGES = {
    "python": 'def area(r):\n    """Disc."""\n    return PI * r ** 2  # simple\n',
    "c": '#include <stdio.h>\n/* greet */\nint main(void) { puts("hi"); return 0; }\n',
    "rust": '// greet\nfn main() {\n    let s = "hi";\n    println!("{}", s);\n}\n',
    "javascript": "// add\nexport const add = (a, b) => { return `${a + b}`; };\n",
    "sql": "-- all of them\nselect name from people where age >= 'x'\n",
    "html": '<!-- page -->\n<div class="box">for you</div>\n',
}


def metric(text: str, name: str) -> float:
    return feature(make_observation(text=text), name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identifier_diversity", 2 / 3),  # x, foo, x
        ("keyword_share", 2 / 5),  # if, return
        ("punctuation_share", 3 / 16),  # : ( )
        ("comment_share", 0.0),
        ("indentation", math.log(5) / 2),  # 0 and 4 columns
        ("bracket_depth", math.log(1 + 2 / 24)),  # inside at "(" and "x"
        # lengths 5, 17, 0: mean 22/3, variance 314/3 - (22/3)²
        ("line_variation", math.log(1 + math.sqrt(314 / 3 - (22 / 3) ** 2) / (22 / 3))),
    ],
)
def test_metric_of_a_snippet_is_what_one_counts(name: str, expected: float) -> None:
    assert metric(SNIPPET, name) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("# hi", 1.0),
        ("#include <a>", 0.0),
        ("#[derive(A)]", 0.0),
        ("a // b c", 6 / 8),
        ("http://a", 0.0),
        ("/* a */ b", 7 / 9),
        ("b /* open", 7 / 9),
        ("<!-- a -->b", 10 / 11),
        ("-- sql\nx", 6 / 8),
        ('a = "b\\"c"', 6 / 10),
        ("a = 'b", 2 / 6),
        ("'a\nbc", 2 / 5),
        ('"""a\n"b" ""\n"""c', 15 / 16),
        ("x = `t` + 1", 3 / 11),
        ('"# no" # yes', 11 / 12),
        ("no prose at all", 0.0),
    ],
)
def test_comment_share_knows_comments_and_strings(text: str, share: float) -> None:
    assert metric(text, "comment_share") == pytest.approx(share)


@pytest.mark.parametrize("language", LANGUAGES)
def test_metrics_in_any_language_find_keywords_and_comments(language: str) -> None:
    text = LANGUAGES[language]
    assert 0 < metric(text, "keyword_share") < 1
    assert 0 < metric(text, "comment_share") < 1
    assert 0 < metric(text, "punctuation_share") < 1


@pytest.mark.parametrize(
    ("text", "mean_depth"),
    [("a[b]", 2 / 4), ("([{}])", (1 + 2 + 3 + 2 + 1) / 6), (")))", 1.0), ("a", 0.0), ("", 0.0)],
)
def test_bracket_depth_counts_from_the_shallowest_point(text: str, mean_depth: float) -> None:
    assert metric(text, "bracket_depth") == pytest.approx(math.log1p(mean_depth), abs=1e-6)


def test_indentation_takes_a_tab_as_four_columns_and_skips_blank_lines() -> None:
    assert metric("\ta\n    \n  \tb\n", "indentation") == pytest.approx(math.log(5))


def test_line_variation_of_equal_lines_is_zero() -> None:
    assert metric("abcd\nabcd\nabcd", "line_variation") == 0.0


def test_compressed_share_falls_with_repetition() -> None:
    assert metric("ab" * 500, "compressed_share") < 0.03
    words = " ".join(f"{i * 7919 % 10007:x}" for i in range(200))
    assert 0.4 < metric(words, "compressed_share") < 1
    assert metric("a", "compressed_share") == 1.0


@pytest.mark.parametrize("name", ["punctuation_share", "comment_share", "identifier_diversity"])
def test_metrics_of_other_scripts_and_broken_text_count_no_code(name: str) -> None:
    assert metric("\ufffd\ufffd \ufffd", name) == 0.0
    assert metric("", name) == 0.0


@pytest.mark.parametrize("piece", ['"""', "'\\", '"\\', "/*", "/**", "<!--", "<!-", "\\", "(", "`"])
def test_metrics_of_hostile_text_take_linear_time(piece: str) -> None:
    text = piece * 100_000
    began = time.perf_counter()
    assert math.isfinite(metric(text, "comment_share"))
    assert time.perf_counter() - began < 5
