"""``python tests/conformance/torchmeta.py SOURCE``: torchmeta's own tests (github.com/tristandeleu/pytorch-meta).

They need flaky and ordered-set (``pip install flaky ordered-set``).
"""

from harness import main

ROOT = "torchmeta/tests"
FOLDERS = ("modules", "utils", "toy", "transforms", "datasets")

main("torchmeta", tests=[f"{ROOT}/{folder}" for folder in FOLDERS], skipped={}, ignored={})
