"""The memory of devices that are not here: by name, or as a size."""

from jaxkv.show.text import is_number, parse_bytes, parse_size

# As the makers' data sheets say, of one card or one chip.
CARDS: dict[str, str] = {
    "T4": "16GB",  # NVIDIA T4 Tensor Core GPU: 16 GB GDDR6
    "L4": "24GB",  # NVIDIA L4: 24 GB GDDR6
    "L40S": "48GB",  # NVIDIA L40S: 48 GB GDDR6
    "A100-40": "40GB",  # NVIDIA A100 40GB: HBM2
    "A100-80": "80GB",  # NVIDIA A100 80GB: HBM2e
    "H100": "80GB",  # NVIDIA H100 SXM and PCIe: 80 GB
    "H200": "141GB",  # NVIDIA H200: 141 GB HBM3e
    "v5e": "16GB",  # Google Cloud TPU v5e: 16 GB HBM per chip
    "v5p": "95GB",  # Google Cloud TPU v5p: 95 GB HBM per chip
    "v6e": "32GB",  # Google Cloud TPU v6e (Trillium): 32 GB HBM per chip
}


def parse_device(text: str) -> int:
    """Bytes of a device's memory from a card's name, or from a size with its unit.

    Raises:
      ValueError: for anything else.

    >>> parse_device("H100"), parse_device("24GiB")
    (80000000000, 25769803776)
    """
    named = {card.lower(): size for card, size in CARDS.items()}
    card = text.strip().lower()
    if card in named or is_number(text):
        return parse_size(named.get(card, text))
    try:
        return parse_bytes(text)
    except ValueError:
        raise ValueError(
            f"Not a device: {text!r}. Expected its memory, such as 24GB or 24GiB, or a card: "
            f"{', '.join(CARDS)}."
        ) from None
