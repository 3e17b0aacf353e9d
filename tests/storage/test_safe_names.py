"""Any text makes a safe file name, and different texts make different names."""

import ntpath
from pathlib import PurePosixPath, PureWindowsPath

from hypothesis import example, given
from hypothesis import strategies as st

from prefect_flux_kontext.storage.names import make_safe_name

PLAIN = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,60}[A-Za-z0-9_]", fullmatch=True)

HOSTILE = [
    "",
    ".",
    "..",
    "...",
    "-",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "..\\..\\windows",
    "C:\\x",
    "a\0b",
    "a\nb",
    "-rf",
    ".hidden",
    "con",
    "CON.txt",
    "com1.jpg",
    "  nul. ",
    "aux/",
    "🦊🦊🦊",
    "\u202egpj.exe",
    "שלום",
    "\ud800",
    "é",
    "e\u0301",
    "a b",
    "a  b",
    "a-b",
    "a" * 5_000,
    "a" * 80,
    "a" * 81,
    "x" * 79 + ".",
    "%2e%2e%2f",
    "~root",
    "a::b",
    "s3://bucket/key",
    "$(id)",
    "*?[x]",
]


def isreserved(name):
    """Whether Windows reserves the name."""
    judge = getattr(ntpath, "isreserved", None)  # since Python 3.13
    return judge(name) if judge else PureWindowsPath(name).is_reserved()


def hostile(test):
    for text in HOSTILE:
        test = example(text)(test)
    return test


@hostile
@given(st.text())
def test_safe_name_is_one_short_path_component(text):
    name = make_safe_name(text)
    assert 0 < len(name) <= 93
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-~")
    assert name[0] not in "-.~"
    assert not isreserved(name)
    folder = PurePosixPath("/out")
    assert (folder / f"{name}.jpg").parent == folder
    assert make_safe_name(text) == name


@given(PLAIN.filter(lambda text: not isreserved(text)))
def test_safe_name_keeps_plain_names(text):
    assert make_safe_name(text) == text
    assert make_safe_name(make_safe_name(text)) == text


@given(st.text(), st.text())
@example("a b", "a-b")
@example("a/b", "a\\b")
@example("con", "_con")
@example("", "unnamed")
@example("a" * 81, "a" * 80)
def test_safe_names_of_different_texts_differ(one, other):
    assert (make_safe_name(one) == make_safe_name(other)) == (one == other)


def test_safe_names_of_hostile_texts_differ():
    names = {text: make_safe_name(text) for text in HOSTILE}
    assert len(set(names.values())) == len(HOSTILE)
    for name in names.values():
        # A name that was made of one text, given as a text itself.
        assert make_safe_name(name) == name or make_safe_name(name) not in names.values()
