"""Styles from the package or from a file; an error lists every problem of a file."""

import json

import fsspec
import pytest

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.sandbox.painting import STYLES, choose_style
from prefect_flux_kontext.storage.names import make_safe_name
from prefect_flux_kontext.styles.styles import builtin_styles, read_styles, select_styles


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a file of styles."""

    def write(content, name="own.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def problem(styles):
    with pytest.raises(ConfigurationError) as caught:
        select_styles(styles)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.message


def test_built_in_styles_match_their_names_and_say_what_to_keep():
    styles = builtin_styles()
    assert len(styles) == 11
    for name, style in styles.items():
        assert make_safe_name(name) == name
        assert "Keep" in style.prompt
        assert choose_style(style.prompt).name == name.replace("-", " ")
    assert set(STYLES) == {name.replace("-", " ") for name in styles}


def test_select_styles_keeps_the_order_and_drops_repeats():
    chosen = select_styles(["noir", "oil", "noir"]).chosen
    assert [style.name for style in chosen] == ["noir", "oil"]
    assert select_styles("oil").chosen == (builtin_styles()["oil"],)
    assert select_styles(None).chosen == select_styles([]).chosen == ()


def test_file_adds_styles_and_replaces_built_in_ones(file):
    own = file("ink: Redraw it in ink\nnoir:\n  prompt: My own\n  mode: max\n")
    styles = select_styles(["oil", own, "noir"])
    assert [style.name for style in styles.chosen] == ["oil", "ink", "noir"]
    assert styles.known["noir"].prompt == "My own"
    assert styles.known["noir"].parameters == {"mode": "max"}
    assert "watercolour" in styles.known


def test_json_and_yaml_give_equal_styles(file):
    fields = {"prompt": "Redraw it", "aspect_ratio": "1:1", "extra": {"steps": 4}}
    (first,) = read_styles(file(json.dumps({"ink": fields}), "own.json"))
    (second,) = read_styles(
        file("\ufeffink: {prompt: Redraw it, aspect_ratio: '1:1', extra: {steps: 4}}")
    )
    assert first == second
    assert first.parameters == {"aspect_ratio": "1:1", "extra": {"steps": 4}}


def test_read_styles_accepts_any_filesystem():
    fsspec.filesystem("memory").pipe_file("/styles/own.yml", b"ink: Redraw it in ink")
    assert [style.name for style in read_styles("memory://styles/own.yml")] == ["ink"]


def test_unknown_name_suggests_the_closest_style():
    message = problem(["watercolor", "oil", "xyzzy"])
    assert "no style 'watercolor', did you mean 'watercolour'?" in message
    assert "no style 'xyzzy' (there are watercolour, oil" in message


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not a mapping from names to prompts"),
        ("- ink\n", "not a mapping from names to prompts"),
        ("{}", "not a mapping from names to prompts"),
        ("ink: [1]\n", "'ink' must be a prompt or a mapping"),
        ("ink: ~\n", "'ink' must be a prompt or a mapping"),
        ("ink: {1: x}\n", "'ink' must be a prompt or a mapping"),
        ("no: Redraw it\n", "the name False is not text; put it in quotes"),
        ("ink: {mode: pro}\n", "'ink': prompt is missing"),
        ("ink: ''\n", "'ink': prompt '': String should have at least 1 character"),
        ("ink: {prompt: x, ratio: '1:1'}\n", "there is no field `ratio`; there are prompt, mode"),
        ("ink: {prompt: x, aspect_ratio: '2:1'}\n", "aspect_ratio '2:1': Input should be 'match'"),
        ("ink: {prompt: x, aspect_ratio: 1:1}\n", "aspect_ratio"),
        ("ink: {prompt: x, mode: turbo}\n", "mode 'turbo': Input should be 'pro' or 'max'"),
        ("ink: {prompt: x, name: y}\n", "'ink' must not set `name`; its key is its name"),
        ("ink: {prompt: x, extra: {mode: max}}\n", "extra must not set mode; set it as a field"),
        ("ink: {prompt: x, extra: {n: .nan}}\n", "extra is not JSON"),
        ("ink: {prompt: x, extra: {n: 2024-01-01}}\n", "extra is not JSON"),
        ("ink: '{% for x in y %}{% endfor %}'\n", "'ink': prompt: the template uses a loop"),
        ("ink: x\nink: y\n", "it names 'ink' twice"),
        ("ink: {prompt: x, prompt: y}\n", "it names 'prompt' twice"),
        ("ink: x\nINK: y\n", "'INK' and 'ink' differ only in case"),
        ("../x: y\n", "name: the name leads out of the output"),
        ("/x: y\n", "name: the name is an absolute path"),
        ("a/b: y\n", "name: the name holds a slash"),
        ("CON: y\n", "name: the name is reserved on Windows"),
        ("x.yaml: y\n", "name: the name has the extension of a styles file"),
        ('"a\\nb": y\n', "name: the name contains an invisible character"),
        ("' x ': y\n", "name: the name begins or ends with a space"),
        (f"{'x' * 61}: y\n", "String should have at most 60 characters"),
        (BOMB, "aliases (`*`) are not allowed"),
        ("a: &a\n  b: *a\n", "aliases (`*`) are not allowed"),
        ("a: {<<: {prompt: x}, mode: pro}", "cannot be read: could not determine"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: " + "[" * 5_000, "nested too deeply"),
        ("a: 'x", "cannot be read: while scanning a quoted scalar"),
        ("a: x\n---\nb: y\n", "cannot be read: expected a single document"),
        ("ink: é\n".encode("latin-1"), "it is not in UTF-8"),
        ("ink: x".encode("utf-16"), "it is not in UTF-8"),
        ("ink: " + "x" * 1_000_001, "more than 1,000,000 bytes"),
        (b"\x00\x01", "cannot be read: "),
    ],
)
def test_invalid_file_error_names_file_and_style(file, content, expected):
    path = file(content)
    message = problem(path)
    assert path in message
    assert expected in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": "x", "a": "y"}', "it names a twice"),
        ("[" * 100_000, "nested too deeply"),
        ("{'a': 1}", "cannot be read: Expecting property name"),
        ('["a"]', "not a mapping"),
    ],
)
def test_invalid_json_file_is_reported(file, content, expected):
    assert expected in problem(file(content, "own.json"))


def test_error_lists_all_problems_of_a_file(file):
    message = problem(file("a: {prompt: x, mode: y, ratio: z}\nb: ~\n3: x\n"))
    for word in ("'a': mode 'y'", "`ratio`", "'b' must be", "the name 3"):
        assert word in message


def test_same_style_in_two_files_is_refused(file):
    first, second = file("ink: x\n"), file("ink: y\n", "other.yaml")
    assert problem([first, second]) == f"The style 'ink' is in {first} and in {second}."


@pytest.mark.parametrize("url", ["{tmp}/none.yaml", "{tmp}/folder.yaml", "nope://x.yaml"])
def test_unreadable_file_is_named(url, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    url = url.format(tmp=tmp_path)
    assert url in problem(url)


def test_chained_filesystems_are_refused():
    assert "chain several filesystems" in problem("simplecache::s3://bucket/x.yaml")
