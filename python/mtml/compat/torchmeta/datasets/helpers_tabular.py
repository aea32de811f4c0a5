"""Tabular data sets of the original: none is here."""

from mtml.compat.torchmeta.datasets.absent import absent

__all__ = ["bach", "letter", "plants_margin", "plants_shape", "plants_texture"]

letter, bach = absent("letter"), absent("bach")
plants_texture, plants_shape, plants_margin = absent("plants_texture"), absent("plants_shape"), absent("plants_margin")
