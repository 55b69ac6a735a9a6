import pytest

from jaxkv.memory import parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 24 * 2**30),
        ("24gib", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("512MB", 512_000_000),
        ("512k", 512_000),
        ("2T", 2 * 10**12),
        ("1000", 1000),
        ("7 B", 7),
        (" 80GiB ", 80 * 2**30),
    ],
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "24 G B", "1e9", "cuda:0", "24GBGB"])
def test_not_bytes(text):
    with pytest.raises(ValueError, match="Expected such as 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("32k", 32_768), ("128K", 131_072), ("1m", 1_048_576), ("4096", 4096), ("4,096", 4096)],
)
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "1.5k", "-4", "32kb", "many"])
def test_not_tokens(text):
    with pytest.raises(ValueError, match="Expected such as 32k"):
        parse_tokens(text)
