"""Which layers of a backbone EAGLE-3 fuses (arXiv 2503.01840): the head and the formats of its files agree on it."""


def fused_layers(num_layers: int) -> tuple[int, int, int]:
    """A low, a middle and a high layer, by the number of layers up to it. 32 layers: 2, 16, 29, as published; 6: 1, 3,
    5."""
    low, middle = max(1, num_layers // 16), max(1, num_layers // 2)
    return low, middle, max(middle, num_layers - max(1, round(num_layers * 3 / 32)))
