"""The row key depends on the inputs that determine a payment, and on nothing else."""

import random
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import Entry
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.row import Row, make_row
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.references.identity import url_identity
from prefect_flux_kontext.styles.templates import is_missing_value

TEXT = st.text(min_size=1, max_size=30).filter(lambda text: text.strip())
WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=12)
# Not a bare word, which may be the name of a batch's own file or reserved on Windows.
IDS = WORDS.map("row-{}-1".format)
PLAIN = TEXT.filter(lambda text: "{" not in text and not is_missing_value(text.strip()))
URLS = st.builds(
    lambda host, path, query: f"https://{host}.test/{path}?{query}",
    st.text("abcdef", min_size=1, max_size=8),
    WORDS,
    st.dictionaries(WORDS, TEXT, max_size=3).map(
        lambda query: "&".join(f"{name}={quote(value)}" for name, value in query.items())
    ),
)
REQUESTS = st.builds(
    GenerationRequest,
    prompt=TEXT,
    image_urls=st.lists(URLS, max_size=1),
    mode=st.sampled_from(["pro", "max"]),
    aspect_ratio=st.sampled_from(["21:9", "16:9", "1:1"]),
    output_format=st.sampled_from(["jpeg", "png"]),
    provider=st.sampled_from(["auto", "value", "official"]),
    prompt_upsampling=st.none() | st.booleans(),
    safety_tolerance=st.none() | st.integers(0, 2),
    watermark=st.none() | TEXT,
    extra=st.dictionaries(WORDS, st.integers() | TEXT, max_size=2),
)
SIGNATURES = [
    "X-Amz-Algorithm=AWS4&X-Amz-Credential=AK%2F20&X-Amz-Date={n}&X-Amz-Signature={n}",
    "X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Security-Token=t{n}&X-Amz-Signature={n}",
    "X-Goog-Algorithm=GOOG4&X-Goog-Credential=c&X-Goog-Date={n}&X-Goog-Signature={n}",
    "AWSAccessKeyId=AK&Expires={n}&Signature=s{n}",
    "GoogleAccessId=a&Expires={n}&Signature=s{n}",
    "Expires={n}&Key-Pair-Id=K&Policy=p{n}&Signature=s{n}",
    "sv=2024-01-01&ss=b&srt=o&sr=b&st=t{n}&se=u{n}&sp=r&spr=https&skoid=o&sig={n}",
]


@given(REQUESTS)
def test_key_ignores_the_callback_url(request_):
    called_back = request_.model_copy(
        update={"callback_url": "https://us.test/token", "request_type": "callback"}
    )
    assert compute_row_key(called_back) == compute_row_key(request_)


@given(REQUESTS, REQUESTS)
def test_keys_are_equal_only_for_equal_payments(one, other):
    references = [[url_identity(url) for url in each.image_urls] for each in (one, other)]
    same = one.body()["input"] == other.body()["input"] and one.provider == other.provider
    same = same or (
        references[0] == references[1]
        and one.model_copy(update={"image_urls": []})
        == other.model_copy(update={"image_urls": []})
    )
    assert (compute_row_key(one) == compute_row_key(other)) == same


@given(
    REQUESTS,
    st.sampled_from(
        [
            ("prompt", "another"),
            ("mode", None),
            ("aspect_ratio", "9:16"),
            ("output_format", None),
            ("provider", None),
            ("prompt_upsampling", None),
            ("safety_tolerance", None),
            ("enable_translation", False),
            ("watermark", "another"),
            ("extra", {"another": 1}),
            ("image_urls", ["https://another.test/1.jpg"]),
        ]
    ),
)
def test_every_paid_parameter_changes_the_key(request_, change):
    name, value = change
    others = {
        "mode": {"pro": "max", "max": "pro"},
        "output_format": {"jpeg": "png", "png": "jpeg"},
        "provider": {"auto": "value", "value": "official", "official": "auto"},
        "prompt_upsampling": {None: True, True: False, False: None},
        "safety_tolerance": {None: 0, 0: 1, 1: 2, 2: None},
    }
    now = getattr(request_, name)
    value = others[name][now] if name in others else value
    if value != now:
        assert compute_row_key(request_.model_copy(update={name: value})) != compute_row_key(
            request_
        )


@given(st.lists(st.tuples(IDS, PLAIN), min_size=1, max_size=5), st.randoms())
def test_key_ignores_order_ids_and_lines(rows, rng):
    cells = [{"id": row_id, "prompt": prompt} for row_id, prompt in rows]
    keys = {c["prompt"].strip(): compute_row_key(make_row(2, c).request) for c in cells}
    rng.shuffle(cells)
    for line, row in enumerate(cells, start=7):
        again = make_row(line, {**row, "id": f"{rng.random()}"})
        assert compute_row_key(again.request) == keys[row["prompt"].strip()]


@pytest.mark.parametrize("signature", SIGNATURES)
def test_url_identity_ignores_signatures(signature):
    plain = "https://bucket.test/a%20cat.jpg?versionId=7"
    today, tomorrow = (f"{plain}&{signature.format(n=n)}" for n in (1, 2))
    assert url_identity(today) == url_identity(tomorrow) == url_identity(plain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://h.test/i?st=1", "https://h.test/i?st=2"),
        ("https://h.test/i?sp=1", "https://h.test/i?sp=2"),
        ("https://h.test/i?policy=a", "https://h.test/i?policy=b"),
        ("https://h.test/i?expires=a", "https://h.test/i?expires=b"),
        ("https://h.test/i?v=%ff", "https://h.test/i?v=%fe"),
        ("https://h.test/i?a=1&sig=x", "https://h.test/i?a=2&sig=x"),
    ],
)
def test_url_identity_keeps_other_parameters(one, other):
    """Some parameters only resemble a signature."""
    assert url_identity(one) != url_identity(other)


@pytest.mark.parametrize(
    "reference", ["/data/a#1?v=2.jpg", "s3://bucket/a b?x#y", "abfs://container@account/a.jpg"]
)
def test_reference_that_is_not_a_web_url_is_its_own_identity(reference):
    assert url_identity(reference) == reference


@given(URLS, st.sampled_from(SIGNATURES), st.booleans())
def test_url_identity_is_idempotent(url, signature, signed):
    if signed:
        url += "&" + signature.format(n=random.randint(1, 9))
    assert url_identity(url_identity(url)) == url_identity(url)


@pytest.mark.anyio
async def test_record_contains_no_secrets(tmp_path):
    """Signatures, passwords and callback tokens are not written to the ledger."""
    url = f"https://user:hunter2@bucket.test/cat.jpg?{SIGNATURES[0].format(n='s3cr3t')}"
    request = GenerationRequest(
        prompt="a cat", image_urls=[url], callback_url="https://us.test/s3cr3t-token"
    )
    row = Row(id="cat", line=2, values=request, key=compute_row_key(request), name="cat")
    ledger = Ledger(RecordStore(str(tmp_path)), "o", {"pro": 0.03, "max": 0.06})
    key = compute_row_key(request)
    entry = await ledger.claim(row, Entry(key=key))
    text = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert "s3cr3t" not in text
    assert "hunter2" not in text
    # `collect` computes the same key from the record.
    assert compute_row_key(entry.intent.request) == key
