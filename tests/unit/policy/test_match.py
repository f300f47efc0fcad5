"""Paths are read in one way or refused, and templates match what they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.match import PathError, PathTemplate, TemplateError, split_path


@pytest.mark.parametrize(
    ("path", "segments"),
    [
        pytest.param("/", (), id="the root has no segments"),
        pytest.param("/items", ("items",), id="one segment"),
        pytest.param("/items/a%20b", ("items", "a b"), id="percent-encoding is undone once"),
        pytest.param("/items/%C3%A9", ("items", "é"), id="UTF-8 behind percent-encoding"),
        pytest.param("/items/", ("items", ""), id="a trailing slash is an empty last segment"),
        pytest.param("/items/a:b@c=d", ("items", "a:b@c=d"), id="what RFC 3986 allows stays"),
        pytest.param("/items/...", ("items", "..."), id="three dots are a name"),
        pytest.param("/items/%23", ("items", "#"), id="an encoded hash is data"),
    ],
)
def test_a_plain_path_is_split(path, segments):
    assert split_path(path) == segments


@pytest.mark.parametrize(
    ("path", "why"),
    [
        pytest.param("items", "does not begin with /", id="relative"),
        pytest.param("", "does not begin with /", id="empty"),
        pytest.param("//items", "empty segment", id="two slashes first"),
        pytest.param("/items//a", "empty segment", id="two slashes inside"),
        pytest.param("/items/../a", "dot segment", id="parent"),
        pytest.param("/items/./a", "dot segment", id="itself"),
        pytest.param("/items/%2e%2e/a", "dot segment", id="encoded parent"),
        pytest.param("/items/.%2E/a", "dot segment", id="half encoded parent"),
        pytest.param("/items%2fa", "encodes a slash", id="encoded slash"),
        pytest.param("/items%5ca", "encodes a slash, a backslash", id="encoded backslash"),
        pytest.param("/items%252fa", "a percent sign", id="twice encoded"),
        pytest.param("/items%3bp", "a semicolon", id="encoded path parameter"),
        pytest.param("/items%00", "a control character", id="encoded NUL"),
        pytest.param("/items%0d%0a", "a control character", id="encoded line break"),
        pytest.param("/items;p", "path parameters", id="path parameter"),
        pytest.param("/items#a", "must not stand there raw", id="fragment"),
        pytest.param("/items\\a", "must not stand there raw", id="backslash"),
        pytest.param("/items/\xe9", "must not stand there raw", id="raw Latin-1"),
        pytest.param("/items/%e9", "not UTF-8", id="encoded Latin-1"),
        pytest.param("/items/%zz", "must not stand there raw", id="no hexadecimal"),
        pytest.param("/items/a b", "must not stand there raw", id="space"),
        pytest.param("/items/a\n", "must not stand there raw", id="line break at the end"),
    ],
)
def test_a_path_with_a_second_reading_is_refused(path, why):
    with pytest.raises(PathError, match=why):
        split_path(path)


@given(st.text(max_size=40))
def test_any_text_is_split_or_refused_and_nothing_ambiguous_gets_through(text):
    try:
        segments = split_path("/" + text)
    except PathError:
        return
    for segment in segments:
        assert not set(segment) & set("/\\%;\0")
        assert segment not in (".", "..")
    assert "" not in segments[:-1]


@pytest.mark.parametrize(
    ("template", "path", "values"),
    [
        pytest.param("/", "/", {}, id="the root"),
        pytest.param("/items", "/items", {}, id="a literal"),
        pytest.param("/items", "/Items", None, id="case matters"),
        pytest.param("/items", "/items/", None, id="a trailing slash is another path"),
        pytest.param("/items/{id}", "/items/a", {"id": "a"}, id="a variable"),
        pytest.param("/items/{id}", "/items/", None, id="a variable is never empty"),
        pytest.param("/items/{id}", "/items/a/b", None, id="a variable is one segment"),
        pytest.param("/items/{id}", "/items", None, id="too short"),
        pytest.param("/c/{+rest}", "/c/a/b", {"rest": "a/b"}, id="the rest takes several"),
        pytest.param("/c/{+rest}", "/c/", None, id="the rest is never empty"),
        pytest.param("/a%20b", "/a%20b", None, id="a literal is compared decoded"),
    ],
)
def test_a_template_matches_what_it_says(template, path, values):
    assert PathTemplate.parse(template).match(split_path(path)) == values


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("items", "begins with /", id="relative"),
        pytest.param("/items?x", "no query", id="a query"),
        pytest.param("/items#x", "no query or fragment", id="a fragment"),
        pytest.param("/{a}/{a}", "names each variable once", id="a name twice"),
        pytest.param("/{+a}/b", "stands last", id="the rest is not last"),
        pytest.param("/x{a}", "a whole segment", id="a variable within a segment"),
        pytest.param("/{1a}", "a whole segment", id="a bad name"),
        pytest.param("/a//b", "empty segment", id="an empty segment"),
        pytest.param("/a;b", "path parameters", id="a path parameter"),
    ],
)
def test_a_template_that_could_never_match_is_refused(text, why):
    with pytest.raises(TemplateError, match=why):
        PathTemplate.parse(text)


def test_more_specific_templates_rank_first():
    texts = ["/{+rest}", "/{a}/b", "/a/{b}", "/a/b"]
    templates = sorted((PathTemplate.parse(text) for text in texts), key=lambda template: template.rank)
    assert [template.text for template in templates] == ["/a/b", "/a/{b}", "/{a}/b", "/{+rest}"]
