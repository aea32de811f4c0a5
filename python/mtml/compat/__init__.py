"""Other meta-learning libraries by their own names, for scripts that were written for them: change the import.

`mtml.compat.learn2learn`, `higher`, `torchopt` and `torchmeta` have the signatures and the semantics of the originals,
with torch alone beneath. `install` lets a script keep even its imports, as does ``python -m mtml.compat SCRIPT``.

>>> import mtml.compat
>>> mtml.compat.install()
>>> import learn2learn as l2l  # the original where it is installed, else mtml.compat.learn2learn
"""

from __future__ import annotations

from mtml.compat.names import LIBRARIES, install

__all__ = ["LIBRARIES", "install"]
