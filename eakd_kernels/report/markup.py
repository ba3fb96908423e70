"""HTML as elements, of which text is always text: whatever a token says, it becomes no tag."""

import unicodedata
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\x7f": "␡"}
_UNSEEN = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")
_BREAKING = ("Cc", "Cs", "Zl", "Zp")
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # which would reverse the tokens that follow


def element(tag: str, attributes: dict[str, object] | None = None, *children: "Element | str") -> Element:
    """Children: elements, or text. An attribute of True has no value."""
    made = Element(tag, {name: "" if value is True else str(value) for name, value in (attributes or {}).items()})
    for child in children:
        if isinstance(child, str):
            _append_text(made, child)
        else:
            made.append(child)
    return made


def to_html(*elements: Element) -> str:
    return "\n".join(ElementTree.tostring(made, encoding="unicode", method="html") for made in elements)


def visible(text: str) -> str:
    """A token on its own, where spaces and line breaks would not show. As token_page.js has it."""
    return "".join(_sign(c) if unicodedata.category(c) in _UNSEEN else c for c in text) or "∅"


def inline(text: str) -> str:
    """A token among others: on one line, and what no page can hold, or would change other tokens, as a sign."""
    return "".join(_sign(c) if _is_signed_inline(c) else c for c in text)


def _is_signed_inline(c: str) -> bool:
    return unicodedata.category(c) in _BREAKING or unicodedata.bidirectional(c) in _TURNING


def _sign(character: str) -> str:
    code = ord(character)
    if character in _SIGNS:
        return _SIGNS[character]
    return chr(0x2400 + code) if code < 0x20 else f"U+{code:04X}"


def _append_text(made: Element, text: str) -> None:
    if len(made):
        made[-1].tail = (made[-1].tail or "") + text
    else:
        made.text = (made.text or "") + text
