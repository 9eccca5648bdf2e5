"""HTML from values that are not trusted: what is not Html yet is escaped where it is put into an element."""

from html import escape


class Html(str):
    """Text that is markup already; any other str is escaped before it goes into an element."""


def element(name: str, *children: str | None, **attributes: str) -> Html:
    """An HTML element. Attributes with a trailing underscore stand for Python's reserved words."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children if child)
    return Html(f"<{name}{written}>{inside}</{name}>")


def join(parts: list[Html]) -> Html:
    """Markup one after the other."""
    return Html("".join(parts))
