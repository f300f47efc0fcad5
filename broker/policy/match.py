"""Paths: read in exactly one way or refused, then matched against templates.

Law: refuse, don't repair. A path with more than one reading (`//`, `/../`, `%2f`, `;p`, a second layer of percent-encoding) never
reaches a template, because the upstream might take the other reading. The path that was judged is, byte for byte, the path sent.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

# pchar and "/" of RFC 3986 section 3.3, without ";": servers disagree on whether path parameters are part of a segment.
_PLAIN = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,=:@/]|%[0-9A-Fa-f]{2})*\Z")
# After decoding: nothing that a second decoder, a file system or a log would read as structure.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f/\\%;]")


class PathError(ValueError):
    """The path can be read in more than one way; the message says why."""


def split_path(path: str) -> tuple[str, ...]:
    """Decoded segments of a raw path that begins with `/`; `/` alone is no segments. Raises `PathError`.

    A trailing slash is a last, empty segment: `/a/` is not `/a`.
    """
    if not path.startswith("/"):
        raise PathError("the path does not begin with /")
    if path == "/":
        return ()
    if not _PLAIN.match(path):
        raise PathError("the path has a character that must not stand there raw (RFC 3986 section 3.3), or path parameters")
    segments = path[1:].split("/")
    if "" in segments[:-1]:
        raise PathError("the path has an empty segment (//)")
    return tuple(map(_decoded, segments))


def _decoded(segment: str) -> str:
    if "%" in segment:
        try:
            segment = unquote_to_bytes(segment).decode("utf-8")
        except UnicodeDecodeError:
            raise PathError("the path's percent-encoding is not UTF-8") from None
        if _AMBIGUOUS.search(segment):
            raise PathError("the path encodes a slash, a backslash, a percent sign, a semicolon or a control character")
    if segment in (".", ".."):
        raise PathError("the path has a dot segment (/./ or /../)")
    return segment


_VARIABLE = re.compile(r"\{(\+?)([A-Za-z_][A-Za-z0-9_]*)\}\Z")


class TemplateError(ValueError):
    """The template itself is wrong; the message says where."""


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """A path with variables: `{name}` is one segment, `{+name}` (RFC 6570 reserved expansion), only last, one or more.

    `parts` holds a literal segment as `(None, text)` and a variable as `(name, "" or "+")`; `pattern` is the same as one
    expression, which runs in linear time: a variable ends at the next slash, a rest at the end.
    """

    text: str
    parts: tuple[tuple[str | None, str], ...]
    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> "PathTemplate":
        """Read a template. Raises `TemplateError`."""
        if not text.startswith("/") or "?" in text or "#" in text:
            raise TemplateError("a path template begins with / and has no query or fragment")
        *inner, end = text[1:].split("/")
        parts = (*(_part(segment, last=False) for segment in inner), _part(end, last=True))
        names = [name for name, _ in parts if name is not None]
        if len(names) != len(set(names)):
            raise TemplateError("a path template names each variable once")
        return cls(text, parts, re.compile("".join(_expression(*part) for part in parts), re.DOTALL))

    @property
    def rank(self) -> tuple[int, ...]:
        """Sorts templates so that the more specific one is tried first: literals before variables before rests."""
        return tuple(0 if name is None else 1 if kind == "" else 2 for name, kind in self.parts)

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """The variables' values, or None when the path is not of this shape."""
        found = self.pattern.fullmatch("/" + "/".join(segments))  # no segment has a slash in it, see `split_path`
        return found.groupdict() if found else None


def _expression(name: str | None, kind: str) -> str:
    return f"/{re.escape(kind)}" if name is None else f"/(?P<{name}>.+)" if kind else f"/(?P<{name}>[^/]+)"


def _part(segment: str, *, last: bool) -> tuple[str | None, str]:
    if variable := _VARIABLE.match(segment):
        rest, name = variable.groups()
        if rest and not last:
            raise TemplateError(f"{{+{name}}} takes the rest of the path, so it stands last")
        return name, rest
    if "{" in segment or "}" in segment:
        raise TemplateError(f"a variable is a whole segment, such as /{{name}}/, not {segment!r}")
    if not segment and not last:
        raise TemplateError("the path template has an empty segment (//)")
    try:
        split_path(f"/{segment}")
    except PathError as error:
        raise TemplateError(str(error)) from None
    return None, segment
