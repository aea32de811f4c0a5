"""learn2learn's own unit tests, all but those of data: ``python tests/conformance/learn2learn.py SOURCE``."""

from harness import main

main(
    "learn2learn",
    tests=[
        "tests/unit/utils_test.py",
        "tests/unit/algorithms/maml_test.py",
        "tests/unit/algorithms/metasgd_test.py",
        "tests/unit/algorithms/gbml_test.py",
        "tests/unit/nn/protonet_test.py",
        "tests/unit/nn/kroneckers_test.py",
        "tests/unit/nn/misc.py",
    ],
    skipped={},
    ignored={
        "tests/unit/nn/metaoptnet_test_notravis.py": "needs the solver qpth",
        "tests/unit/algorithms/lightning_*_notravis.py": "download CIFAR-FS",
        "tests/unit/vision": "download data sets",
        "tests/integration": "download Omniglot and mini-ImageNet",
    },
)
