"""Formulas of the pages, as `docs/extensions/formulas.py` sets them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

HOOK = Path(__file__).parents[2] / "docs" / "extensions" / "formulas.py"


@pytest.fixture(scope="module")
def formulas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("formulas", HOOK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("∇L_s(θ_{k+1})", "∇L<sub>s</sub>(θ<sub>k+1</sub>)"),
        ("F_sᵀ A^W_k", "F<sub>s</sub>ᵀ A<sup>W</sup><sub>k</sub>"),
        ("dL/dα_k and logits_k", "dL/dα<sub>k</sub> and logits<sub>k</sub>"),
        ("Σ_{j&lt;k}", "Σ<sub>j&lt;k</sub>"),
        ("step_weights, l2l_higher_omniglot, bce_with_logits, sm_80", None),
    ],
)
def test_indices(formulas: ModuleType, text: str, expected: str | None) -> None:
    assert formulas.raised(text) == (expected or text)


def test_columns_stay_columns(formulas: ModuleType) -> None:
    """An index that is small and has lost its braces is made up for before the next gap, to the quarter character."""
    line = formulas.aligned("θ_{k+1} = θ_k − α_k        k = 0")
    gaps = [float(width) for width in re.findall(r'<span style="padding-left: ([\d.]+)ch"></span>(?= )', line)]
    assert gaps == [6 - 3 * formulas.SMALL, 2 * (2 - formulas.SMALL)]
    assert re.sub(r"<[^>]*>", "", line) == "θk+1 = θk − αk        k = 0"


def test_code_and_the_reference_stay(formulas: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="guide.md"))
    plain = "<pre><span></span><code>x_k = 1\n</code></pre>"
    coloured = "<pre><span></span><code><span>W_0</span> = 1</code></pre>"
    content = f"<p id='L_q'>L_q, <code>L_q</code></p>{plain}{coloured}"
    found = formulas.on_page_content(content, page=page)
    assert found.startswith("<p id='L_q'>L<sub>q</sub>, <code>L_q</code></p>")
    assert "x<sub>k</sub>" in found and found.endswith(coloured)
    page.file.src_uri = "api/engine.md"
    assert formulas.on_page_content(content, page=page) == content
