"""learn2learn's own unit tests of data: ``python tests/conformance/learn2learn_data.py SOURCE``."""

from harness import main

FOLDER = "tests/unit/data"

main(
    "learn2learn",
    tests=["tests/__init__.py", "tests/unit/__init__.py", FOLDER],
    skipped={},
    ignored={f"{FOLDER}/metadataset_test.py": "downloads MNIST and Omniglot by torchvision"},
)
