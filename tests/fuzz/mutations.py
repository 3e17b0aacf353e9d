"""Mutations of a corpus: bytes that are nearly valid reach further than random ones."""

from hypothesis import strategies as st

# Text and bytes that have a meaning in one of the formats.
TOKENS = [
    *(b'"', b",", b"\n", b"\r\n", b"\0", b"[", b"]", b"{", b"}", b":", b"\\", b"\\u0000", b"'"),
    *(b"null", b"true", b"NaN", b"1e999", b"-1", b"9" * 400, b"\xef\xbb\xbf", b"\xff"),
    *(b"\xed\xa0\x80", b"../", b"s3://", b"file:///etc/passwd", b"{{ id }}", b"\x1b[2J"),
    *(b"https://u:p@a.test/?sig=x", b"\xff\xd8", b"\xff\xda", b"\xff\xd9", b"\xff\xe1"),
    *(b"\xff\xfe\x00\x02", b"IEND", b"IDAT", b"eXIf", b"VP8X", b"RIFF", b"EXIF", b"\x00\x00"),
    *(b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"),
]


@st.composite
def mutated(draw, corpus):
    """Return an entry of the corpus after up to six edits."""
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(0, 6))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        match draw(st.sampled_from(["cut", "token", "noise", "repeat", "splice", "flip"])):
            case "cut":
                data = data[:start] + data[end:]
            case "token":
                data = data[:start] + draw(st.sampled_from(TOKENS)) + data[start:]
            case "noise":
                data = data[:start] + draw(st.binary(max_size=20)) + data[start:]
            case "repeat":
                data = data[:end] + data[start:end][:1_000] * draw(st.integers(1, 20)) + data[end:]
            case "splice":
                data = data[:start] + draw(st.sampled_from(corpus))[start:]
            case "flip" if start < len(data):
                flipped = data[start] ^ 1 << draw(st.integers(0, 7))
                data = data[:start] + bytes([flipped]) + data[start + 1 :]
    return data
