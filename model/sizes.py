"""Feature schemas that give the four sizes their published parameter counts, and so their memory.

For benchmarks without data of that scale: almost all parameters of the larger sizes are embedding rows. A real data set brings its
own schema.
"""

from __future__ import annotations

from pipeline.contracts import HEADS, Feature, FeatureSchema

ROWS: dict[str, dict[str, int]] = {
    "tiny": {"item": 60_000, "shop": 20_000, "user": 40_000, "place": 2_000},
    "small": {"item": 16_000_000, "shop": 3_000_000, "user": 11_000_000, "place": 950_000},
    "base": {"item": 33_000_000, "shop": 5_500_000, "user": 22_000_000, "place": 1_000_000},
    "large": {"item": 66_000_000, "shop": 11_000_000, "user": 44_000_000, "place": 1_800_000},
}
"""Rows of the tables that grow with the business; with 64 columns (32 for tiny) they bring each size to its published total."""

CROSS = ("item_count", "item_recency", "shop_count", "shop_recency", "category_count", "category_recency", "popularity", "price_gap")


def reference_schema(size: str) -> FeatureSchema:
    """A food-delivery-like schema for one of `SIZES`: 4 user tokens, 6 event, 5 candidate and 8 cross columns."""
    rows = ROWS[size]
    item, shop = Feature(name="item", rows=rows["item"]), Feature(name="shop", rows=rows["shop"])
    category, price = Feature(name="category", rows=1_000), Feature(name="price", rows=64)
    place = Feature(name="place", rows=rows["place"])
    return FeatureSchema(
        user=(Feature(name="user", rows=rows["user"]), place, Feature(name="age", rows=16), Feature(name="gender", rows=3)),
        event=(item, shop, category, price, Feature(name="action", rows=16), Feature(name="gap", rows=64)),
        candidate=(item, shop, category, price, place),
        cross=CROSS,
        heads=HEADS,
    )
