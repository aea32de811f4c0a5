"""`python -m bench results`: the page says what the records say."""

from __future__ import annotations

from bench.report import trainings


def test_the_page_is_that_of_the_records() -> None:
    assert trainings.PAGE.read_text() == trainings.page(trainings.read_records())


def test_a_record_stands_beside_what_was_published() -> None:
    records = trainings.read_records()
    conv4 = records["omniglot-conv4-5way-1shot-finn2017"]
    row = next(line for line in trainings.page(records).splitlines() if line.startswith("| conv4 | 5, 1 |"))
    assert "98.7 (MAML)" in row and f"{conv4['iterations']} | 60 min on 2 threads" in row
    assert f"**{100 * conv4['accuracy'][-1]['mean']:.2f} ± " in row


def test_what_was_not_trained_is_said() -> None:
    lines = [
        line for line in trainings.page({}).splitlines() if line[:7] in ("| conv4", "| mlp |", "| MAML ", "| Meta-")
    ]
    assert len(lines) == 12 and all("not trained here" in line for line in lines)
