"""Bytes that a reader of foreign files may meet, for hypothesis."""

import json

from hypothesis import strategies as st

# Values of JSON with what is rare in it: huge, negative and not finite numbers, deep and odd names.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4), max_leaves=12)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` cut short, with bytes changed, put in or left out somewhere."""
    places = st.integers(0, len(content))

    @st.composite
    def changed(draw) -> bytes:
        start, stop = sorted((draw(places), draw(places | st.just(0))))
        stop = min(stop, start + draw(st.sampled_from([0, 1, 4, len(content)])))
        return content[:start] + draw(st.binary(max_size=8)) + content[stop:]

    return changed() | places.map(lambda place: content[:place])


@st.composite
def altered(draw, described: dict) -> bytes:
    """A JSON object with one value, at any depth, replaced by another or left out."""
    whole = json.loads(json.dumps(described))
    inner = whole
    while True:
        if not inner:
            break
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if isinstance(inner[key], (dict, list)) and inner[key] and draw(st.integers(0, 3)):
            inner = inner[key]
            continue
        if draw(st.booleans()):
            inner[key] = draw(JSON)
        else:
            del inner[key]
        break
    return json.dumps(whole).encode()
