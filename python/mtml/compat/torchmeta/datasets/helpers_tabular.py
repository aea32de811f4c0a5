"""Tabular data sets of the original: none is here."""

from mtml.compat.torchmeta.datasets.absent import Absent

__all__ = ["bach", "letter", "plants_margin", "plants_shape", "plants_texture"]

letter, bach = Absent("letter"), Absent("bach")
plants_texture, plants_shape, plants_margin = Absent("plants_texture"), Absent("plants_shape"), Absent("plants_margin")
